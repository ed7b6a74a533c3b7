"""Judges the policy of a run against its reference, on held-out prompts."""

from __future__ import annotations

import contextlib
import functools
import os
import textwrap
from typing import Any

import jax
import ml_collections
import numpy as np

from bond_jax.data import examples, sources
from bond_jax.devices import hosts, sharding, shares
from bond_jax.errors import UserError
from bond_jax.evaluation import completions, sweep
from bond_jax.evaluation.report import page
from bond_jax.measures import aggregate, curves
from bond_jax.models import policies, stops
from bond_jax.rewards import calling, make
from bond_jax.runs import (
  command,
  configs,
  environment,
  files,
  fingerprints,
  log,
  paths,
  provenance,
  show,
  stages,
)
from bond_jax.training import checks, text_task
from bond_jax.weights import load


def folder_of(workdir: str, step: int, against: str) -> str:
  """Where an evaluation is written, below the workdir.

  That of the last checkpoint against the reference is the run's own.
  """
  if against == 'reference':
    done = os.path.exists(os.path.join(workdir, 'train', 'summary.json'))
    if done and step == load.find_step(workdir, 'train', 'last'):
      return '.'
    return os.path.join('evaluate', f'step_{step}')
  other = os.path.basename(against)
  last = load.find_step(against, 'train', 'last')
  return os.path.join('evaluate', f'step_{step}_against_{other}_{last}')


def rows_folder(workdir: str, folder: str) -> str:
  """Where the metrics of an evaluation go, and what it is made of."""
  return os.path.join(workdir, 'evaluate' if folder == '.' else folder)


def evaluate(
  config: ml_collections.ConfigDict,
  workdir: str,
  folder: str = '.',
  checkpoint: int | str = 'last',
  against: str = 'reference',
) -> dict[str, Any]:
  """Draws, judges and reports; returns the summary of the whole run.

  Args:
    config: of the run.
    workdir: of the run.
    folder: below it, in which the results go.
    checkpoint: of the policy.
    against: 'reference', or the folder of another run.
  """
  settings, mesh = config.evaluate, sharding.make_mesh(**config.mesh)
  tokenizer = load.load_tokenizer(config, workdir)
  # A bad row shows before weights are loaded.
  held_out = sources.rows(config, 'test')
  read = functools.partial(text_task.texts, config, tokenizer, held_out)
  prompts = examples.fixed_prompts(
    held_out,
    load.make_encoder(config, tokenizer),
    length=config.prompt.length,
    count=settings.prompts,
  )
  mine, reference = load_sides(config, workdir, str(checkpoint), mesh)
  theirs = reference
  if against != 'reference':
    theirs = load_other(against, tokenizer, mesh)
  stop = stops.of(tokenizer, config.stop)
  program = completions.make_draw(config, stop, mesh)
  key = configs.key(config.seed, 'evaluate')

  def draw(stream, own, other, first, num):
    of_stream = jax.random.fold_in(key, stream)
    return program(own, other, prompts, of_stream, first, num)

  own = shares.own(mesh, settings.prompts)
  opponents = functools.partial(draw, 2, reference, mine, 0)
  judges = make_judges(config, workdir, opponents, prompts, read, own)
  sides = [
    completions.Side('policy', settings.policy_completions,
                     functools.partial(draw, 0, mine, theirs)),
    completions.Side('reference', settings.reference_completions,
                     functools.partial(draw, 1, theirs, mine)),
  ]  # fmt: skip
  where = os.path.normpath(os.path.join(workdir, folder))
  own_rows = rows_folder(workdir, folder)
  total = sum(side.count for side in sides)
  path = os.path.join(where, 'completions.jsonl')
  made_of = lambda: provenance.of_evaluation(
    config, workdir, checkpoint, against
  )
  hosts.once(lambda: completions.begin(path, own_rows, made_of()))
  rows = completions.collect(
    path, sides,
    completions.make_judge(judges, read, own), prompts,
    at_once=settings.at_once,
    writer_of=lambda done: log.Writer(own_rows, 'evaluate', total, done),
  )  # fmt: skip

  def told() -> dict[str, Any]:
    watched = log.read_rows(os.path.join(own_rows, 'metrics.jsonl'))
    summary = summarise(where, rows) | throughput(watched)
    summary |= history(config, workdir, watched)
    summary |= {'checkpoint': checkpoint, 'against': against}
    draw_report(config, workdir, where, rows, summary)
    return summary

  return hosts.once(told)


def load_sides(
  config, workdir: str, checkpoint: str, mesh
) -> tuple[completions.Model, completions.Model]:
  """The policy of a run, and its reference."""
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  params = load.load_policy(
    config, policy, workdir, checkpoint, mesh, alone=False
  )
  reference, base = load.load_frozen(config, policy, workdir, mesh)
  return (
    completions.Model(policy, params, base),
    completions.Model(policy, reference, base),
  )


def load_other(workdir: str, tokenizer, mesh) -> completions.Model:
  """The last policy of another run; a UserError if it reads other pieces."""
  workdir = os.path.abspath(workdir)
  started = configs.check_version(workdir)
  with contextlib.chdir(paths.home(workdir, started)):
    return _load_other(workdir, tokenizer, mesh)


def _load_other(workdir: str, tokenizer, mesh) -> completions.Model:
  config = configs.read_config(workdir)
  theirs = load.load_tokenizer(config, workdir)
  if theirs.sha256 != tokenizer.sha256:
    raise UserError(
      f'--against={workdir} has another tokenizer ({theirs.vocab_size} pieces,'
      f' {theirs.sha256[:12]}, here {tokenizer.vocab_size},'
      f' {tokenizer.sha256[:12]}): log-probs of the same completion need the'
      ' same pieces.'
    )
  return load_sides(config, workdir, 'last', mesh)[0]


def make_judges(config, workdir: str, opponents, prompts, read, own):
  """The reward, as training sees it, and gold: functions of texts, by name.

  A judge of pairs compares with completions that `opponents(num)` draws of the
  reference. No prompt may be missing here, so that a failure stops.
  """
  ask, ask_gold = (
    make.make_ask(config, name, workdir, failure='stop')
    for name in ('reward', 'gold')
  )
  ask_reward = ask
  if config.reward.opponents:
    drawn, _, _ = opponents(config.reward.opponents)
    theirs = calling.some(own, *read(prompts, drawn))
    ask_reward = lambda *texts: calling.against(ask, texts, theirs)
  return {
    'reward': lambda *texts: ask_reward(*texts).value,
    'gold': lambda *texts: ask_gold(*texts).value,
  }


def summarise(folder: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
  """What the rows of a folder's completions.jsonl say; see `measures`."""
  try:
    return aggregate.summarise(rows)
  except ValueError as e:
    path = os.path.join(folder, 'completions.jsonl')
    raise UserError(
      f'{path}: {e}. If it was changed, move it away, to draw them anew.'
    ) from e


def throughput(rows: list[dict[str, Any]]) -> dict[str, Any]:
  """Tokens per second of drawing and scoring, of the calls' median.

  A call that compiles is slow, so that one call says nothing.
  """
  pairs = [(row.get('tokens/decoded'), row.get('seconds/sample'))
           for row in rows]  # fmt: skip
  rates = [
    tokens / seconds
    for tokens, seconds in pairs
    if all(map(log.is_number, (tokens, seconds))) and seconds > 1e-6
  ]
  rate, reason = None, None
  if len(rates) < 3:
    reason = f'there were {len(rates)} calls, and those that compile are slow'
  else:
    rate = float(np.median(rates))
  return {'tokens_per_second': rate, 'throughput_reason': reason}


def history(config, workdir: str, own) -> dict[str, Any]:
  """What the earlier stages, and this one, took and left behind.

  Of a training that has not finished there is less to say. `own` are the rows
  of this stage's metrics.
  """
  start = configs.reference_dir(config, workdir)
  trained = stage_rows(workdir, 'train')
  phases = {
    **{f'train/{k}': v for k, v in log.phase_seconds(trained).items()},
    **{f'evaluate/{k}': v for k, v in log.phase_seconds(own).items()},
  }
  row = {}
  keys = ('steps', 'anchor_drift', 'signal_fires',
          'compilations_after_first_step')  # fmt: skip
  if train := summary_of(workdir, 'train', *keys):
    row |= {key: train[key] for key in keys}
  if 'sft' in config:
    keys = 'phase_seconds', 'parameters', 'validation_loss'
    sft = summary_of(start, 'sft', *keys)
    took = (
      sft['phase_seconds'] if isinstance(sft['phase_seconds'], dict) else {}
    )
    phases |= {f'sft/{k}': v for k, v in took.items()}
    row['parameters'] = sft['parameters']
    row['sft_validation_loss'] = sft['validation_loss']
  if reward := summary_of(
    start, 'reward', 'seconds'
  ):  # one of the user's has no stage
    phases['reward/fit'] = reward['seconds']
    row |= {  # of preferences there is no correlation, of a ridge no share
      f'reward_{key}': reward[key]
      for key in ('test_pearson', 'accuracy')
      if key in reward
    }
  phases = {k: v for k, v in phases.items() if log.is_number(v)}
  row['seconds'] = round(sum(phases.values()), 3)
  return {**row, 'phase_seconds': {k: round(v, 3) for k, v in phases.items()}}


def summary_of(workdir: str, stage: str, *keys: str) -> dict[str, Any]:
  """What a stage has left; nothing if it has not finished.

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


def stage_rows(workdir: str, stage: str) -> list[dict[str, Any]]:
  return log.read_rows(os.path.join(workdir, stage, 'metrics.jsonl'))


def draw_report(config, workdir: str, folder: str, rows, summary) -> None:
  """Writes report.html and its figures into `folder`."""
  rewards_ = aggregate.grid(rows, 'reference')['reward']
  start = configs.reference_dir(config, workdir)
  path = page.write_report(
    folder,
    settings=config.to_dict(),
    train=stage_rows(workdir, 'train'),
    sft=stage_rows(start, 'sft') if 'sft' in config else [],
    summary=summary,
    curve=curves.best_of_n_curve(rewards_),
    samples=page.side_by_side(rows, config.evaluate.samples_shown),
  )
  print(f'\n{textwrap.fill(page.sentence(summary), 80)}')
  print(f'The report is {path}')


def headlines(summary: dict[str, Any]) -> list[tuple]:
  """The table of the measures that the report opens with."""
  shown = {**summary, 'seconds': show.clock(summary['seconds'])}
  rows = [
    (
      label.replace('the reference', page.opponent(summary)),
      shown.get(key),
      shown.get(extra, ''),
    )
    for label, key, extra in page.HEADLINES
  ]
  return [('', 'value', 'interval or error'), *rows]


def main(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoint: str = 'last',
  against: str = 'reference',
) -> None:
  """One evaluation of one run."""
  hosts.start()  # before anything is looked at that hosts must agree on
  environment.configure_jax()
  stages.check_stage('evaluate', config, workdir)
  checks.check(config)  # a checkpoint may be there for a config that is wrong
  if against != 'reference':
    against = os.path.normpath(against)
  step = load.find_step(workdir, 'train', checkpoint)
  folder = folder_of(workdir, step, against)
  hosts.once(lambda: check_finished(config, workdir, folder, step, against))
  stages.stage(
      'evaluate', functools.partial(evaluate, folder=folder), config, workdir,
      folder=folder, check=checks.check, table=headlines, checkpoint=step,
      against=against,
  )  # fmt: skip


def check_finished(config, workdir, folder, step, against) -> None:
  """Refuses to take a finished evaluation of something else for this one."""
  summary = os.path.normpath(os.path.join(workdir, folder, 'summary.json'))
  if not os.path.exists(summary):
    return
  before = completions.made_of(rows_folder(workdir, folder))
  now = provenance.of_evaluation(config, workdir, step, against)
  lines = fingerprints.changed(
    {k: x for k, x in before.items() if k in now}, now if before else {}
  )
  if lines:
    raise UserError(
      f'{summary} is there, of an evaluation of other things:'
      f' {"; ".join(lines[:5])}. Nothing was changed; move it away to draw and'
      ' judge anew.'
    )


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  given, checkpoint = command.run_flags(), command.checkpoint_flag()
  against = paths.flag(
    'against', 'reference', 'What is compared with: "reference", or a run.'
  )
  runs = paths.flag(
    'sweep', None, 'Runs, as "runs/*": what is known of all, in one figure.'
  )
  out = paths.flag('out', None, 'Of --sweep; runs/sweep by default.')

  def go():
    if runs.value:
      sweep.sweep(runs.value, out.value)
    else:
      main(*given(), checkpoint=checkpoint.value, against=against.value)

  command.execute(go, doc)
