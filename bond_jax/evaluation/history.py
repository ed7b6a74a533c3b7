"""Numbers of a report that earlier stages, and the log, have left behind."""

import os
from typing import Any

import numpy as np

from bond_jax.errors import UserError
from bond_jax.runs import files, log
from bond_jax.runs.settings import configs

Rows = list[dict[str, Any]]

TRAIN = 'anchor_drift', 'signal_fires', 'compilations_after_first_step'


def history(config, workdir: str, own: Rows) -> dict[str, Any]:
  """Seconds by phase of all stages, and numbers of their summaries.

  A stage that has not finished, or that the run does not have, adds less. `own`
  are the rows of the evaluation's metrics.
  """
  start = configs.reference_dir(config, workdir)
  row, phases = {}, {}
  trained = stage_rows(workdir, 'train')
  for stage, rows in (('train', trained), ('evaluate', own)):
    seconds = log.phase_seconds(rows)
    phases |= {f'{stage}/{phase}': x for phase, x in seconds.items()}
  if train := stage_summary(workdir, 'train', *TRAIN):
    row |= {key: train[key] for key in TRAIN}
  if 'sft' in config:
    keys = 'phase_seconds', 'parameters', 'validation_loss'
    sft = stage_summary(start, 'sft', *keys)
    if isinstance(sft['phase_seconds'], dict):
      phases |= {f'sft/{k}': v for k, v in sft['phase_seconds'].items()}
    row['parameters'] = sft['parameters']
    row['sft_validation_loss'] = sft['validation_loss']
  # A reward of the user's own has no stage; one trained on preferences has no
  # correlation, a ridge has no accuracy.
  if reward := stage_summary(start, 'reward', 'seconds'):
    phases['reward/fit'] = reward['seconds']
    for key in ('test_pearson', 'accuracy'):
      if key in reward:
        row[f'reward_{key}'] = reward[key]
  phases = {k: v for k, v in phases.items() if log.is_number(v)}
  row['seconds'] = round(sum(phases.values()), 3)
  return row | {'phase_seconds': {k: round(v, 3) for k, v in phases.items()}}


def throughput(rows: Rows) -> dict[str, Any]:
  """Tokens per second of drawing and scoring: the median over the calls.

  None, with a reason, for fewer than three calls: the first ones compile.
  """
  pairs = [(r.get('tokens/decoded'), r.get('seconds/sample')) for r in rows]
  rates = [
    tokens / seconds
    for tokens, seconds in pairs
    if log.is_number(tokens) and log.is_number(seconds) and seconds > 1e-6
  ]
  if len(rates) >= 3:
    rate = float(np.median(rates))
    return {'tokens_per_second': rate, 'throughput_reason': None}
  reason = f'there were {len(rates)} calls, and those that compile are slow'
  return {'tokens_per_second': None, 'throughput_reason': reason}


def stage_summary(workdir: str, stage: str, *keys: str) -> dict[str, Any]:
  """The summary of a stage; {} if it has not finished.

  A UserError if it lacks one of `keys`.
  """
  path = os.path.join(workdir, stage, 'summary.json')
  if not os.path.exists(path):
    return {}
  summary = files.read_json(path)
  if missing := [key for key in keys if key not in summary]:
    raise UserError(
      f'{path} lacks {", ".join(missing)}: it was changed, or another version'
      f' of bond_jax wrote it. Restore it, or run the {stage} stage again.'
    )
  return summary


def stage_rows(workdir: str, stage: str) -> Rows:
  return log.read_rows(os.path.join(workdir, stage, 'metrics.jsonl'))
