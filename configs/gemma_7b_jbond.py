"""J-BOND of Gemma 7B, one of the BOND paper's two; see gemma_jbond.py.

    launch/tpu_vm.sh train --config=configs/gemma_7b_jbond.py \
      --workdir=... --config.weights=... --config.tokenizer.path=... \
      --config.data.name=... --config.reward.function=... \
      --config.gold.function=... --config.train.steps=...

Hardware: docs/sizing.md, from the compiler; not yet tried.
"""

from configs import gemma_jbond


def get_config():
  config = gemma_jbond.get_config(
    'gemma_7b',
    vocab_size=256_000,
    learning_rate=3e-6,
    lora_rank=0,
    sampling_model=16,
  )
  config.train.buckets = 1  # a second one costs memory, and compiles as long
  return config
