"""The stage that trains a reward, of the kind that the config names."""

import functools
import itertools
import os
import time
from typing import Any

import ml_collections

from bond_jax.data import preferences, sources
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import hosts
from bond_jax.reward_models import report as reward_report
from bond_jax.reward_models import train
from bond_jax.runs import show, stages
from bond_jax.runs.settings import configs, defaults
from bond_jax.training import checks
from bond_jax.weights import load


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  hosts.start()
  stages.check_stage('reward_model', config, workdir)
  defaults.check(config.to_dict(), defaults.TEXT_NEEDS)
  work, table = train.train, reward_report.headlines
  if config.reward_model.kind == 'ridge':
    work, table = ridge, show.scalars
  stages.stage(
    'reward_model', work, config, workdir, folder='reward', open_run=open_run,
    table=table,
  )  # fmt: skip


def open_run(config: ml_collections.ConfigDict, workdir: str) -> stages.Run:
  """The run, with the rows of the reward model's data.

  A UserError for rows on which the model is both fitted, chosen or judged: its
  penalty or its last step is chosen on the validation split.
  """
  run = checks.open_run(config, workdir)
  if config.reward_model.kind != 'ridge' and 'data' in config.reward_model:
    mine = configs.of_reward_model(config)
    rows = functools.cache(functools.partial(sources.rows, mine))
    run = run._replace(rows=rows)
  splits = {split: run.rows(split) for split in preferences.SPLITS}
  sources.check_apart(splits, *itertools.combinations(splits, 2))
  return run


def ridge(run: stages.Run) -> dict[str, Any]:
  """Fits the ridge regression, on one host alone; returns the summary."""
  # Here, because it imports scikit-learn, which takes a second.
  from bond_jax.reward_models import ridge_fit

  start, config = time.perf_counter(), run.config
  settings = {k: v for k, v in config.reward_model.items() if k != 'kind'}

  def tokenizer_of(texts):
    """That of the weights, or one that is trained here if it is missing."""
    if config.tokenizer.path:
      return load.load_tokenizer(config, run.workdir)
    path = os.path.join(run.workdir, tokenizer_lib.FILE)
    return tokenizer_lib.ensure(path, texts, config.tokenizer.vocab_size)

  report = hosts.once(
    lambda: ridge_fit.build(
      {split: run.rows(split) for split in preferences.SPLITS},
      tokenizer_of=tokenizer_of,
      workdir=run.workdir,
      **settings,
    )
  )
  return {**report, 'seconds': round(time.perf_counter() - start, 3)}
