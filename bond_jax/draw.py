"""Draws completions of the training prompts once, to train on them offline.

    python -m bond_jax.draw --workdir=RUN --n=8

draws them from the reference of RUN, its teacher if it has one, lets the
reward score them, and writes RUN/draw/completions.jsonl, a row for each
prompt. Another run reads it as `--config.data.stored`, and draws none itself:
see docs/data.md. A killed command goes on where it was. `--prompts` is how
many, the first of the split.
"""

from bond_jax.evaluation import draw

if __name__ == '__main__':
  draw.run(__doc__)
