"""The third stage: Best-of-N distillation of the reference.

`python -m bond_jax.train --config=configs/demo.py --workdir=runs/demo` leaves
the policy in train/checkpoints. Killed at any moment and started again, it goes
on from the last checkpoint and ends with the same parameters.
"""

from bond_jax.runs import command
from bond_jax.training import distil

if __name__ == '__main__':
  command.run(distil.main, __doc__)
