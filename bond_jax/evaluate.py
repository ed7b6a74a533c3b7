"""The last stage: is one sample of the policy worth N of the reference?

`python -m bond_jax.evaluate --config=configs/demo.py --workdir=runs/demo` draws
fresh completions of held-out prompts from both, lets the reward and a judge
that was never trained on score them, and writes completions.jsonl, from which
summary.json and report.html are computed.
"""

from __future__ import annotations

import functools
import json
import os
import textwrap
from typing import Any

import jax
import ml_collections
import numpy as np

from bond_jax import (
  build,
  command,
  data,
  hosts,
  measures,
  metrics,
  origin,
  report,
  scoring,
  sharding,
  shares,
)
from bond_jax.errors import UserError
from bond_jax.log_probs import log_probs
from bond_jax.models import lora
from bond_jax.sampling import sample
from bond_jax.types import Prompts

_CHECKPOINT = command.checkpoint_flag()


def make_draw(policy, config, tokenizer, mesh):
  """A function that samples from `own` and scores with `other` as well.

  Returns `draw(base, own, other, prompts, key, first, num)`: the rollout on the
  host, of `num` completions of each prompt from number `first` on, and their
  summed log-probs f32[B, num] under `own` and under `other`, in nats.
  """

  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)

  def evaluate(base, own, other, prompts, key, first, num):
    whole = lora.over(policy, base)
    drawn = sample(
        whole, own, prompts, key, num=num, length=config.length,
        stop_ids=tokenizer.stop_ids, first=first, slots=config.slots,
        mesh=sampling_mesh,
    )  # fmt: skip
    there = log_probs(
        whole, other, prompts, drawn.completion, drawn.mask,
        chunk=config.chunk,
    )  # fmt: skip
    return drawn, drawn.log_prob.sum(-1), there.sum(-1)

  program = jax.jit(
    evaluate, static_argnames='num', out_shardings=sharding.by_row(mesh)
  )

  def draw(base, own, other, prompts: Prompts, key, first: int, num: int):
    on_mesh = sharding.put_batch(prompts, mesh)
    return shares.fetch(program(base, own, other, on_mesh, key, first, num=num))

  return draw


def ask(judges, texts) -> dict[str, np.ndarray]:
  return {name: judge(*texts) for name, judge in judges.items()}


def records(
  draw, read, judges, prompts, *, who, count, at_once, stop_ids, writer, done,
  rows
):  # fmt: skip
  """Yields the rows of completions.jsonl of one side, `count` per prompt.

  The judges of this host are asked about the prompts in `rows`.
  """
  for first in range(0, count, at_once):
    num = min(at_once, count - first)
    with writer.phase('sample'):
      drawn, here, there = draw(first, num)
    with writer.phase('judge'):
      texts = read(prompts, drawn)
      scores = shares.over(
        rows, functools.partial(ask, judges, scoring.some(rows, *texts))
      )
      check_scores(scores)
    log_policy, log_reference = (
      (here, there) if who == 'policy' else (there, here)
    )
    writer.advance(done + first + num)
    for b, prompt in enumerate(texts[0]):
      for k in range(num):
        length = int(drawn.mask[b, k].sum())
        yield dict(
          id=int(prompts.id[b]),
          prompt=prompt,
          completion=texts[1][b][k],
          **{name: float(value[b, k]) for name, value in scores.items()},
          log_policy=float(log_policy[b, k]),
          log_reference=float(log_reference[b, k]),
          who=who,
          length=length,
          truncated=bool(drawn.completion[b, k, length - 1] not in stop_ids),
        )


def evaluate(
  config: ml_collections.ConfigDict, workdir: str, checkpoint: str
) -> dict[str, Any]:
  """Draws, judges and reports; returns the summary of the whole run."""
  settings = config.evaluate
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = origin.load_tokenizer(config, workdir)
  policy = origin.make_policy(config.model, config.tokenizer.vocab_size)
  reference, base = origin.load_frozen(config, policy, workdir, mesh)
  trained = origin.load_params(policy, workdir, 'train', checkpoint, mesh)
  held_out = build.rows(config, 'test')
  read = functools.partial(build.texts, config, tokenizer, held_out)
  prompts = data.fixed_prompts(
    held_out,
    origin.make_encoder(config, tokenizer),
    length=config.prompt.length,
    count=settings.prompts,
  )
  key = build.key(config.seed, 'evaluate')
  sides = (
    ('policy', settings.policy_completions, trained, reference),
    ('reference', settings.reference_completions, reference, trained),
  )
  folder = os.path.join(workdir, 'evaluate')
  total = sum(count for _, count, _, _ in sides)
  mine = shares.own(mesh, settings.prompts)
  rows, done = [], 0
  with metrics.Writer(folder, 'evaluate', total) as writer:
    draw = make_draw(policy, config, tokenizer, mesh)
    judges = {
      k: build.make_reward(config, config[k], workdir)
      for k in ('reward', 'gold')
    }
    if config.reward.opponents:
      key_of_theirs = jax.random.fold_in(key, len(sides))
      drawn, _, _ = draw(
          base, reference, trained, prompts, key_of_theirs, 0,
          config.reward.opponents,
      )  # fmt: skip
      _, *theirs = scoring.some(mine, *read(prompts, drawn))
      judges['reward'] = scoring.against(judges['reward'], *theirs)
    # What is trained on, penalties and all; here no prompt may be missing.
    rules = {**build.reward_rules(config.reward), 'failure': 'stop'}
    reward, gold = judges['reward'], judges['gold']
    judges = {
      'reward': lambda *asked: scoring.score(reward, *asked, **rules).value,
      'gold': lambda *asked: scoring.call(gold, *asked)[0],
    }
    for i, (who, count, own, other) in enumerate(sides):
      side = functools.partial(
        draw, base, own, other, prompts, jax.random.fold_in(key, i)
      )
      rows += records(
          side, read, judges, prompts, who=who, count=count,
          at_once=settings.at_once, stop_ids=tokenizer.stop_ids,
          writer=writer, done=done, rows=mine,
      )  # fmt: skip
      done += count
    with writer.phase('report'):
      if hosts.first():
        write_records(os.path.join(workdir, 'completions.jsonl'), rows)
      summary = hosts.once(lambda: measures.summarise(rows))
    writer.write(total, {})
  summary |= hosts.once(lambda: history(config, workdir))
  hosts.once(lambda: draw_report(config, workdir, rows, summary))
  return summary


def check_scores(scores: dict[str, np.ndarray]) -> None:
  """Refuses judges of pairs: what is reported are numbers of completions."""
  for name, value in scores.items():
    if value.ndim == 3:
      raise UserError(
        f'{name} compares pairs, and evaluation needs a number for each'
        ' completion: with reward.opponents = 4 it is how often a completion'
        " beats four of the reference's; gold must be a reward."
      )


def write_records(path: str, rows: list[dict[str, Any]]) -> None:
  """Writes JSON lines, whole or not at all."""
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  os.replace(path + '.tmp', path)


def history(config, workdir: str) -> dict[str, Any]:
  """What the earlier stages, and this one, took and left behind."""
  read = lambda folder, name: command.read_json(
    os.path.join(folder, name, 'summary.json')
  )
  start = build.reference_dir(config, workdir)
  train = read(workdir, 'train')
  own = metrics.phase_seconds(stage_rows(workdir, 'evaluate'))
  phases = {
    **{f'train/{k}': v for k, v in train['phase_seconds'].items()},
    **{f'evaluate/{k}': round(v, 3) for k, v in own.items()},
  }
  row = {
    'steps': train['steps'],
    'anchor_drift': train['anchor_drift'],
    'signal_fires': train['signal_fires'],
    'compilations_after_first_step': train['compilations_after_first_step'],
  }
  if 'sft' in config:
    sft = read(start, 'sft')
    phases |= {f'sft/{k}': v for k, v in sft['phase_seconds'].items()}
    row['parameters'] = sft['parameters']
    row['sft_validation_loss'] = sft['validation_loss']
  # A reward of the user's own needs no stage.
  if os.path.exists(os.path.join(start, 'reward', 'summary.json')):
    reward = read(start, 'reward')
    phases['reward/fit'] = reward['seconds']
    row |= {  # of preferences there is no correlation, of a ridge no share
      f'reward_{key}': reward[key]
      for key in ('test_pearson', 'accuracy')
      if key in reward
    }
  row['seconds'] = round(sum(phases.values()), 3)
  return {**row, 'phase_seconds': phases}


def stage_rows(workdir: str, stage: str) -> list[dict[str, Any]]:
  return metrics.read_rows(os.path.join(workdir, stage, 'metrics.jsonl'))


def draw_report(config, workdir, rows, summary) -> None:
  """Writes report.html and its figures."""
  rewards_ = measures.grid(rows, 'reference')['reward']
  start = build.reference_dir(config, workdir)
  sft = stage_rows(start, 'sft') if 'sft' in config else []
  path = report.write_report(
    workdir,
    settings=config.to_dict(),
    train=stage_rows(workdir, 'train'),
    sft=sft,
    summary=summary,
    curve=measures.best_of_n_curve(rewards_),
    samples=report.side_by_side(rows, config.evaluate.samples_shown),
  )
  print(f'\n{textwrap.fill(report.sentence(summary), 80)}')
  print(f'The report is {path}')


def headlines(summary: dict[str, Any]) -> list[tuple]:
  """The table of the measures that the report opens with."""
  shown = {**summary, 'seconds': metrics.clock(summary['seconds'])}
  rows = [
    (label, shown[key], shown[extra] if extra else '')
    for label, key, extra in report.HEADLINES
  ]
  return [('', 'value', 'interval or error'), *rows]


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  build.stage(
      'evaluate', evaluate, config, workdir, folder='.', table=headlines,
      checkpoint=_CHECKPOINT.value,
  )  # fmt: skip


if __name__ == '__main__':
  command.run(main, __doc__)
