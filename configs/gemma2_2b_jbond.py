"""J-BOND of Gemma 2 2B; see gemma_jbond.py.

    launch/tpu_vm.sh train --config=configs/gemma2_2b_jbond.py \
      --workdir=... --config.weights=... --config.tokenizer.path=... \
      --config.data.name=... --config.reward.function=... \
      --config.gold.function=... --config.train.steps=...

Hardware: docs/sizing.md, from the compiler; not yet tried.
"""

from configs import gemma_jbond


def get_config():
  return gemma_jbond.get_config(
    'gemma2_2b',
    vocab_size=256_000,
    learning_rate=3e-6,
    lora_rank=0,
    sampling_model=4,
  )
