r"""The start of xsum_bond.py: a Gemma that summarises, by supervised training.

    launch/tpu_vm.sh sft --config=configs/xsum_sft.py --workdir=runs/xsum \
      --config.weights=... --config.tokenizer.path=...

BOND's first experiments (arXiv 2407.14622, section 4) distil a T5 that was
trained on XSum (Narayan et al., 2018); the paper gives neither its size nor how
it was trained. Here it is Gemma 2B, and all settings are ours. XSum must lie
in data/ as a TFDS builder; see docs/data.md. Hardware, estimated and not yet
tried: a host with 8 TPU v5e chips.
"""

from bond_jax.runs.settings import defaults
from configs import xsum_bond


def get_config():
  config = xsum_bond.get_config('backward_weight=0.5')
  config.sft = defaults.make('text', sft=True).sft
  config.sft.update(
    steps=6000,
    batch=32,
    length=64,  # of a summary, which has some 25 pieces
    save_every=500,
    validation_batches=8,
  )
  config.sft.optimizer.update(
    learning_rate=1e-5, warmup_steps=100, decay_to=0.1, b2=0.999
  )
  return config
