"""Judges the policy of a run against its reference, on held-out prompts."""

from collections.abc import Sequence
import contextlib
import functools
import os
import textwrap
from typing import Any

from absl import flags
import jax
import ml_collections

from bond_jax.data import examples
from bond_jax.devices import hosts, shares
from bond_jax.errors import UserError
from bond_jax.evaluation import completions, history, sweep
from bond_jax.evaluation.report import page
from bond_jax.measures import aggregate, curves
from bond_jax.models import policies, stops
from bond_jax.rewards import calling, make
from bond_jax.runs import (
  command,
  environment,
  files,
  fingerprints,
  log,
  paths,
  provenance,
  show,
  stages,
)
from bond_jax.runs.settings import configs
from bond_jax.training import checks
from bond_jax.training.tasks import text_task
from bond_jax.weights import load, teachers


def folder_of(
  workdir: str, step: int, against: str, factor: float = 1.0
) -> str:
  """Where an evaluation is written, below the workdir.

  That of the last checkpoint against the reference is the run's own.
  """
  if factor != 1:
    return os.path.join('evaluate', f'step_{step}_times_{factor:g}')
  if against == 'reference':
    done = os.path.exists(os.path.join(workdir, 'train', 'summary.json'))
    if done and step == load.find_step(workdir, 'train', 'last'):
      return '.'
    return os.path.join('evaluate', f'step_{step}')
  other = os.path.basename(against)
  last = load.find_step(against, 'train', 'last')
  return os.path.join('evaluate', f'step_{step}_against_{other}_{last}')


def logs_folder(folder: str) -> str:
  """Where the metrics and the inputs of an evaluation go, below the workdir."""
  return 'evaluate' if folder == '.' else folder


def evaluate(
  run: stages.Run,
  folder: str,
  checkpoint: int,
  against: str = 'reference',
  factor: float = 1.0,
) -> dict[str, Any]:
  """Draws, judges and reports; returns the summary of the whole run.

  Args:
    run: of which the policy is.
    folder: below its own, in which the results go.
    checkpoint: of the policy.
    against: 'reference', or the folder of another run.
    factor: other than 1, the policy is extrapolated, see `load.extrapolated`;
      the reference's completions are those of the evaluation without.
  """
  config, workdir, mesh, _ = run
  settings, tokenizer = config.evaluate, load.load_tokenizer(config, workdir)
  # Read before weights are loaded, so that a bad row shows early.
  held_out = run.rows('test')
  read = functools.partial(text_task.texts, config, tokenizer, held_out)
  prompts = examples.fixed_prompts(
    held_out,
    load.make_encoder(config, tokenizer),
    length=config.prompt.length,
    count=settings.prompts,
  )
  policy, reference = load_sides(run, tokenizer, str(checkpoint), factor)
  other = reference
  if against != 'reference':
    other = load_other(against, tokenizer, mesh)
  stop = stops.of(tokenizer, config.stop)
  program = completions.make_draw(config, stop, mesh)
  key = configs.key(config.seed, 'evaluate')

  def draw(stream, own, other, first, num):
    of_stream = jax.random.fold_in(key, stream)
    return program(own, other, prompts, of_stream, first, num)

  rows_of_host = shares.own(mesh, settings.prompts)
  opponents = functools.partial(draw, 2, reference, policy, 0)
  judges = make_judges(config, workdir, opponents, prompts, read, rows_of_host)
  sides = [
    completions.Side('policy', settings.policy_completions,
                     functools.partial(draw, 0, policy, other)),
    completions.Side('reference', settings.reference_completions,
                     functools.partial(draw, 1, other, policy)),
  ]  # fmt: skip
  if factor != 1:
    sides = sides[:1]
  out = os.path.normpath(os.path.join(workdir, folder))
  logs = os.path.normpath(os.path.join(workdir, logs_folder(folder)))
  path = os.path.join(out, 'completions.jsonl')
  inputs = functools.partial(
    provenance.of_evaluation, config, workdir, checkpoint, against, factor
  )
  hosts.once(lambda: completions.begin(path, logs, inputs()))
  total = sum(side.count for side in sides)
  rows = completions.collect(
    path, sides,
    completions.make_judge(judges, read, rows_of_host), prompts,
    at_once=settings.at_once, minutes=settings.minutes,
    writer_of=lambda done: log.Writer(logs, 'evaluate', total, done),
  )  # fmt: skip

  def report() -> dict[str, Any]:
    own = log.read_rows(os.path.join(logs, 'metrics.jsonl'))
    if factor != 1:
      rows.extend(of_reference(workdir, checkpoint))
    summary, curve = measure(out, rows)
    summary |= history.throughput(own) | history.history(config, workdir, own)
    # Of a run that has not finished, the steps are those of its checkpoint.
    summary |= {
      'checkpoint': checkpoint, 'steps': checkpoint, 'against': against
    }  # fmt: skip
    draw_report(config, workdir, out, rows, summary, curve)
    return summary

  return hosts.once(report)


def of_reference(workdir: str, checkpoint: int) -> list[completions.Row]:
  """What the reference wrote in the evaluation of a checkpoint against it."""
  folder = folder_of(workdir, checkpoint, 'reference')
  rows = log.read_rows(os.path.join(workdir, folder, 'completions.jsonl'))
  return [row for row in rows if row.get('who') == 'reference']


def load_sides(
  run: stages.Run, tokenizer, checkpoint: str, factor: float = 1.0
) -> tuple[completions.Model, completions.Model]:
  """The policy of a run, extrapolated by a factor, and its reference."""
  config, workdir, mesh, _ = run
  teacher = teachers.find(config, tokenizer)  # before any weights are read
  policy, start = load_own(config, workdir, checkpoint, mesh, factor)
  if teacher is None:
    return policy, start
  del start  # makes room
  return policy, completions.Model(teacher.policy, teacher.load(mesh), {})


def load_own(
  config, workdir: str, checkpoint: str, mesh, factor: float = 1.0
) -> tuple[completions.Model, completions.Model]:
  """The policy of a run, extrapolated by a factor, and what it started from."""
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  params = load.load_policy(
    config, policy, workdir, checkpoint, mesh, alone=False
  )
  reference, base = load.load_frozen(config, policy, workdir, mesh)
  params = load.extrapolated(config, params, reference, factor)
  return (
    completions.Model(policy, params, base),
    completions.Model(policy, reference, base),
  )


def load_other(workdir: str, tokenizer, mesh) -> completions.Model:
  """The last policy of another run; a UserError if its tokenizer differs."""
  workdir = os.path.abspath(workdir)
  started = configs.check_version(workdir)
  with contextlib.chdir(paths.home(workdir, started)):
    config = configs.read_config(workdir)
    other = load.load_tokenizer(config, workdir)
    if other.sha256 != tokenizer.sha256:
      raise UserError(
        f'--against={workdir} has another tokenizer ({other.vocab_size} pieces,'
        f' {other.sha256[:12]}, here {tokenizer.vocab_size},'
        f' {tokenizer.sha256[:12]}): log-probs of the same completion need the'
        ' same pieces.'
      )
    return load_own(config, workdir, 'last', mesh)[0]


def make_judges(config, workdir: str, opponents, prompts, read, own):
  """The reward, as training sees it, and gold: functions of texts, by name.

  A reward that judges pairs compares with completions of the reference, which
  `opponents(num)` draws. A prompt that fails stops the evaluation.
  """
  judge = lambda name: make.make_ask(config, name, workdir, failure='stop')
  ask_reward = ask = judge('reward')
  ask_gold = judge('gold')
  if config.reward.opponents:
    drawn, _, _ = opponents(config.reward.opponents)
    others = calling.some(own, *read(prompts, drawn))
    ask_reward = lambda *texts: calling.against(ask, texts, others)
  return {
    'reward': lambda *texts: ask_reward(*texts).value,
    'gold': lambda *texts: ask_gold(*texts).value,
  }


def measure(folder: str, rows) -> tuple[dict[str, Any], curves.Curve]:
  """`aggregate.measure` of the rows of a folder's completions.jsonl."""
  try:
    return aggregate.measure(rows)
  except ValueError as e:
    path = os.path.join(folder, 'completions.jsonl')
    raise UserError(
      f'{path}: {e}. If it was changed, move it away, to draw them anew.'
    ) from e


def draw_report(config, workdir, folder, rows, summary, curve) -> None:
  """Writes report.html and its figures into `folder`."""
  start = configs.reference_dir(config, workdir)
  path = page.write_report(
    folder,
    settings=config.to_dict(),
    train=history.stage_rows(workdir, 'train'),
    sft=history.stage_rows(start, 'sft') if 'sft' in config else [],
    summary=summary,
    curve=curve,
    samples=page.side_by_side(rows, config.evaluate.samples_shown),
  )
  print(f'\n{textwrap.fill(page.sentence(summary), 80)}')
  print(f'The report is {path}')


def headlines(summary: dict[str, Any]) -> list[tuple]:
  """The table of the measures that the report opens with."""
  spent = summary['phase_seconds'].items()
  own = sum(v for k, v in spent if k.startswith('evaluate/'))
  shown = summary | {
    'seconds': show.clock(own),
    'all_seconds': show.clock(summary['seconds']),
  }
  name = lambda label: label.replace('the reference', page.opponent(summary))
  rows = [
    (name(label), shown.get(key), shown.get(extra, ''))
    for label, key, extra in page.HEADLINES
  ]
  return [('', 'value', 'interval or error'), *rows]


def main(
  config: ml_collections.ConfigDict,
  workdir: str,
  checkpoint: str = 'last',
  against: str = 'reference',
  factors: Sequence[float] = (),
) -> None:
  """One evaluation of one run, and of its policy extrapolated by `factors`."""
  hosts.start()  # before anything that hosts must agree on
  environment.configure_jax()
  stages.check_stage('evaluate', config, workdir)
  run = checks.open_run(config, workdir)  # also if it is finished already
  if against != 'reference':
    against = os.path.normpath(against)
  step = load.find_step(workdir, 'train', checkpoint)
  if factors and against != 'reference':
    raise UserError(
      '--extrapolate is judged against the reference; leave --against out.'
    )
  others = [factor for factor in factors if factor != 1]
  for factor in others:
    load.check_factor(checkpoint, factor)
  for factor in (1.0, *others):
    folder = folder_of(workdir, step, against, factor)
    check = functools.partial(
      check_finished, config, workdir, folder, step, against, factor
    )
    hosts.once(check)
    stages.stage(
        'evaluate', functools.partial(evaluate, folder=folder), config, workdir,
        folder=folder, open_run=lambda *_: run, table=headlines,
        checkpoint=step, against=against,
        **({'factor': factor} if factor != 1 else {}),
    )  # fmt: skip
  if others:
    hosts.once(lambda: show_extrapolated(config, workdir, step, others))


def check_finished(config, workdir, folder, step, against, factor) -> None:
  """Refuses a finished evaluation that had other inputs."""
  summary = os.path.normpath(os.path.join(workdir, folder, 'summary.json'))
  if not os.path.exists(summary):
    return
  before = completions.inputs_of(os.path.join(workdir, logs_folder(folder)))
  now = provenance.of_evaluation(config, workdir, step, against, factor)
  lines = fingerprints.changed(
    {k: x for k, x in before.items() if k in now}, now if before else {}
  )
  if lines:
    raise UserError(
      f'{summary} is of an evaluation with other inputs'
      f' ({"; ".join(lines[:5])}). Nothing was changed; move it away to draw'
      ' and judge anew.'
    )


def show_extrapolated(
  config, workdir: str, step: int, factors: Sequence[float]
) -> None:
  """A table of a policy and its extrapolations; both join the policy's report.

  Says so where a law has little entropy left, or is far from the reference.
  """
  folder = folder_of(workdir, step, 'reference')
  out = os.path.normpath(os.path.join(workdir, folder))
  path = os.path.join(out, 'summary.json')
  summary = files.read_json(path)
  found = {1.0: summary}
  for factor in factors:
    other = folder_of(workdir, step, 'reference', factor)
    found[factor] = files.read_json(
      os.path.join(workdir, other, 'summary.json')
    )
  keys = ('win_rate', 'kl', 'frontier_efficiency', 'gold_win_rate',
          'entropy_policy')  # fmt: skip
  rows = [
    (f'{factor:g}', *(row[key] for key in keys))
    for factor, row in sorted(found.items())
  ]
  kept = summary.get('extrapolated', {}) | {
    f'{factor:g}': {key: found[factor][key] for key in keys}
    for factor in factors
  }
  summary['extrapolated'] = kept
  files.write_json(path, summary)
  drawn = log.read_rows(os.path.join(out, 'completions.jsonl'))
  draw_report(config, workdir, out, drawn, summary, measure(out, drawn)[1])
  for factor in factors:
    row = found[factor]
    if row['kl'] > 10 or row['entropy_policy'] < row['entropy_reference'] / 2:
      show.warn(
        f'extrapolated by {factor:g} the policy is {row["kl"]:.3g} nats from'
        f' its reference, with {row["entropy_policy"]:.3g} of'
        f' {row["entropy_reference"]:.3g} nats of entropy: read its samples.'
      )
  show.table([('times', *keys), *rows], f'extrapolated: see {out}')


def numbers(texts: Sequence[str]) -> list[float]:
  """The factors of --extrapolate; a UserError for what is no number."""
  try:
    return [float(text) for text in texts]
  except ValueError as e:
    raise UserError(
      f'--extrapolate={",".join(texts)}: give numbers, as 0.8,1.2.'
    ) from e


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  given, checkpoint = command.run_flags(), command.checkpoint_flag()
  against = paths.flag(
    'against', 'reference', 'To compare with: "reference", or a run.'
  )
  factors = flags.DEFINE_list(
    'extrapolate', [], 'Factors, as 0.8,1.2, of the way from the reference.'
  )
  runs = paths.flag('sweep', None, 'Runs, as "runs/*", to draw in one figure.')
  out = paths.flag('out', None, 'Folder of --sweep; runs/sweep by default.')

  def go():
    if runs.value:
      sweep.sweep(runs.value, out.value)
    else:
      main(
        *given(),
        checkpoint=checkpoint.value,
        against=against.value,
        factors=numbers(factors.value),
      )

  command.execute(go, doc)
