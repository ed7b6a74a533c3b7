"""J-BOND of Gemma 3 27B with LoRA; see gemma_jbond.py.

    launch/tpu_vm.sh train --config=configs/gemma3_27b_lora_jbond.py \
      --workdir=... --config.weights=... --config.tokenizer.path=... \
      --config.data.name=... --config.reward.function=... \
      --config.gold.function=... --config.train.steps=...

Hardware: docs/sizing.md, from the compiler; not yet tried.
"""

from configs import gemma_jbond


def get_config():
  config = gemma_jbond.get_config(
    'gemma3_27b',
    vocab_size=262_144,
    learning_rate=3e-5,
    lora_rank=32,
    sampling_model=16,
  )
  config.train.buckets = 1  # a second one costs memory, and compiles as long
  return config
