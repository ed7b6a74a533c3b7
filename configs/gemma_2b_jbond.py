"""J-BOND of Gemma 2B, one of the BOND paper's two; see gemma_jbond.py.

    launch/tpu_vm.sh train --config=configs/gemma_2b_jbond.py \
      --workdir=... --config.weights=... --config.tokenizer.path=... \
      --config.data.name=... --config.reward.function=... \
      --config.gold.function=... --config.train.steps=...

Hardware: docs/sizing.md, from the compiler; not yet tried.
"""

from configs import gemma_jbond


def get_config():
  return gemma_jbond.get_config(
    'gemma_2b', vocab_size=256_000, learning_rate=3e-6, lora_rank=0
  )
