"""J-BOND of Gemma 3 1B; see gemma_jbond.py.

    launch/tpu_vm.sh train --config=configs/gemma3_1b_jbond.py \
      --workdir=... --config.weights=... --config.tokenizer.path=... \
      --config.data.name=... --config.reward.function=... \
      --config.gold.function=... --config.train.steps=...

Hardware: docs/sizing.md, from the compiler; not yet tried.
"""

from configs import gemma_jbond


def get_config():
  return gemma_jbond.get_config(
    'gemma3_1b',
    vocab_size=262_144,
    learning_rate=3e-6,
    lora_rank=0,
    sampling_model=4,  # each chip reads a quarter of the weights for a token
  )
