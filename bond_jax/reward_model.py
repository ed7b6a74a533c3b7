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

import importlib.metadata
import itertools
import os
import time

import ml_collections

from bond_jax import (
  build,
  command,
  hosts,
  metrics,
  preferences,
  reward_report,
  reward_training,
  sources,
)


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  hosts.start()
  build.check_stage('reward_model', config, workdir)
  reward_training.check_kind(config)
  check_splits(config)
  if config.reward_model.kind == 'ridge':
    ridge(config, workdir)
  else:
    build.stage(
        'reward_model', reward_training.train, config, workdir, folder='reward',
        table=reward_report.headlines,
    )  # fmt: skip


def check_splits(config: ml_collections.ConfigDict) -> None:
  """Refuses rows on which the model is both fitted, chosen or judged.

  The model, its penalty or its last step, is chosen on the validation split.
  """
  ridge = config.reward_model.kind == 'ridge'
  mine = config if ridge else reward_training.own(config)
  rows = {split: build.rows(mine, split) for split in preferences.SPLITS}
  sources.check_apart(rows, *itertools.combinations(rows, 2))


def ridge(config: ml_collections.ConfigDict, workdir: str) -> None:
  """Fits the ridge regression, once."""
  path = os.path.join(workdir, 'reward', 'summary.json')
  if not build.begin('reward_model', config, path, workdir, {}):
    return
  build.claim(config, workdir, workdir)
  hosts.once(lambda: fit(config, workdir, path))


def fit(config: ml_collections.ConfigDict, workdir: str, path: str) -> None:
  """Fits, writes what comes out, and shows it; on one host alone."""
  # Here, because it imports scikit-learn, which takes a second.
  from bond_jax import ridge_fit

  start = time.perf_counter()
  settings = {k: v for k, v in config.reward_model.items() if k != 'kind'}
  report = ridge_fit.build(
    {split: build.rows(config, split) for split in preferences.SPLITS},
    vocab_size=config.tokenizer.vocab_size,
    workdir=workdir,
    **settings,
  )
  report['seconds'] = round(time.perf_counter() - start, 3)
  asked = {**config.data.to_dict(), **config.reward_model}
  packages = ('numpy', 'scipy', 'scikit-learn', 'sentencepiece')
  versions = {p: importlib.metadata.version(p) for p in packages}
  command.write_json(path, {'asked': asked, **report, 'versions': versions})
  shown = [(k, v) for k, v in report.items() if k != 'tokenizer_sha256']
  rows = [('', 'value'), *shown]
  metrics.table(rows, f'reward_model: done, see {path}')


if __name__ == '__main__':
  command.run(main, __doc__)
