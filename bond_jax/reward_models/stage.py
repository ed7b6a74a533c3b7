"""The stage that trains a reward, of the kind that the config names."""

from __future__ import annotations

import itertools
import time
from typing import Any

import ml_collections

from bond_jax.data import preferences, sources
from bond_jax.devices import hosts
from bond_jax.reward_models import report as reward_report
from bond_jax.reward_models import train
from bond_jax.runs import configs, fields, show, stages
from bond_jax.training import checks, text_task


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  hosts.start()
  stages.check_stage('reward_model', config, workdir)
  fields.check(config.to_dict(), text_task.NEEDED)
  check_splits(config)
  work, table = train.train, reward_report.headlines
  if config.reward_model.kind == 'ridge':
    work, table = ridge, show.scalars
  stages.stage(
    'reward_model', work, config, workdir, folder='reward', check=checks.check,
    table=table,
  )  # fmt: skip


def check_splits(config: ml_collections.ConfigDict) -> None:
  """Refuses rows on which the model is both fitted, chosen or judged.

  The model, its penalty or its last step, is chosen on the validation split.
  """
  ridge = config.reward_model.kind == 'ridge'
  mine = config if ridge else configs.of_reward_model(config)
  rows = {split: sources.rows(mine, split) for split in preferences.SPLITS}
  sources.check_apart(rows, *itertools.combinations(rows, 2))


def ridge(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Fits the ridge regression, on one host alone; returns the summary."""
  # Here, because it imports scikit-learn, which takes a second.
  from bond_jax.reward_models import ridge_fit

  start = time.perf_counter()
  settings = {k: v for k, v in config.reward_model.items() if k != 'kind'}
  report = hosts.once(
    lambda: ridge_fit.build(
      {split: sources.rows(config, split) for split in preferences.SPLITS},
      vocab_size=config.tokenizer.vocab_size,
      workdir=workdir,
      **settings,
    )
  )
  return {**report, 'seconds': round(time.perf_counter() - start, 3)}
