"""The last stage: is one sample of the policy worth N of the reference?

    python -m bond_jax.evaluate --workdir=RUN

draws fresh completions of held-out prompts from both, lets the reward and a
judge that was never trained on score them, and writes completions.jsonl, from
which summary.json and report.html are computed. `--checkpoint=best`, or a
step, judges another checkpoint; `--against=RUN2` compares with the policy of
another run, in the place of the reference; `--extrapolate=0.8,1.2` judges, too,
what is so many times as far from the reference, in weights. They write into
folders of their own, below RUN/evaluate. `--sweep='runs/*'` draws many runs
into one figure.
"""

from bond_jax.evaluation import evaluate

if __name__ == '__main__':
  evaluate.run(__doc__)
