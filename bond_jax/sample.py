"""Draws completions of a prompt from a run, or from the weights it starts from.

    python -m bond_jax.sample --config=... --workdir=RUN --prompt='...' --n=8

`--best` lets the run's reward choose: Best-of-n. Without `--prompt` it is a
conversation, one line at a time. `--checkpoint=reference` asks what the policy
started from.
"""

from bond_jax.evaluation import sample

if __name__ == '__main__':
  sample.run(__doc__)
