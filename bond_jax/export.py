"""The policy of a finished run, as a folder that others read.

    python -m bond_jax.export --workdir=runs/demo --out=exported

`--format=hf` (the default) is a Hugging Face folder: weights, config.json, the
tokenizer, and how to sample; LoRA is merged. `--format=adapter` is LoRA alone,
as peft reads it; `--format=official` the layout of Gemma's public checkpoints.
`--checkpoint=reference` is the model that the policy started from.
An existing folder is never touched, and a new one appears when it is complete.
"""

from bond_jax.weights import export

if __name__ == '__main__':
  export.run(__doc__)
