"""The first stage: a model that writes like the data, the later reference.

`python -m bond_jax.sft --config=configs/demo.py --workdir=runs/demo` trains
the vocabulary, and then the model by maximum likelihood; it leaves them in
tokenizer.model and sft/checkpoints.
"""

from bond_jax.runs import command
from bond_jax.training import sft

if __name__ == '__main__':
  command.run(sft.main, __doc__)
