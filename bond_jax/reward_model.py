"""The second stage: a model of what people prefer, to be the reward.

`python -m bond_jax.reward_model --config=configs/demo.py --workdir=runs/demo`
leaves in reward/ what `config.reward_model.kind` names:

  ridge: a ridge regression of ratings on n-grams of the run's own pieces, for
    `rewards.ridge.ridge`; see ridge_fit.py. Seconds.
  gemma: a Gemma with a scalar head, trained on preferences or ratings, for
    `rewards.gemma.scalar_head`; see reward_training.py.

Both write reward/summary.json.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import ml_collections

from bond_jax import (
  build,
  command,
  fields,
  hosts,
  metrics,
  preferences,
  reward_report,
  reward_training,
  sources,
  text_task,
)


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  hosts.start()
  build.check_stage('reward_model', config, workdir)
  fields.check(config.to_dict(), text_task.NEEDED)
  check_splits(config)
  work, table = reward_training.train, reward_report.headlines
  if config.reward_model.kind == 'ridge':
    work, table = ridge, metrics.scalars
  build.stage(
    'reward_model', work, config, workdir, folder='reward', table=table
  )


def check_splits(config: ml_collections.ConfigDict) -> None:
  """Refuses rows on which the model is both fitted, chosen or judged.

  The model, its penalty or its last step, is chosen on the validation split.
  """
  ridge = config.reward_model.kind == 'ridge'
  mine = config if ridge else reward_training.own(config)
  rows = {split: build.rows(mine, split) for split in preferences.SPLITS}
  sources.check_apart(rows, *itertools.combinations(rows, 2))


def ridge(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Fits the ridge regression, on one host alone; returns the summary."""
  # Here, because it imports scikit-learn, which takes a second.
  from bond_jax import ridge_fit

  start = time.perf_counter()
  settings = {k: v for k, v in config.reward_model.items() if k != 'kind'}
  report = hosts.once(
    lambda: ridge_fit.build(
      {split: build.rows(config, split) for split in preferences.SPLITS},
      vocab_size=config.tokenizer.vocab_size,
      workdir=workdir,
      **settings,
    )
  )
  return {**report, 'seconds': round(time.perf_counter() - start, 3)}


if __name__ == '__main__':
  command.run(main, __doc__)
