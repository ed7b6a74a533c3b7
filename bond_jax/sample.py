"""Draws completions of a prompt from weights, or from the policy of a run.

    python -m bond_jax.sample --weights=PATH_OR_NAME --prompt='...' --n=8
    python -m bond_jax.sample --workdir=RUN --prompt='...' --n=8

Weights are a folder of Hugging Face or Orbax, a GGUF file or the name of a
release; `--tokenizer` is their SentencePiece file where it is not beside them.
`--best` lets the run's reward choose: Best-of-n. Without `--prompt` it is a
conversation, one line at a time. `--checkpoint=reference` asks what the policy
of a run started from.
"""

from bond_jax.evaluation import sample

if __name__ == '__main__':
  sample.run(__doc__)
