"""The last stage: is one sample of the policy worth N of the reference?

`python -m bond_jax.evaluate --config=configs/demo.py --workdir=runs/demo` draws
fresh completions of held-out prompts from both, lets the reward and a judge
that was never trained on score them, and writes completions.jsonl, from which
summary.json and report.html are computed.
"""

from __future__ import annotations

import json
import os
from typing import Any

from absl import flags
import jax
import ml_collections

from bond_jax import (
  build,
  command,
  data,
  measures,
  metrics,
  report,
  rewards,
  sharding,
)
from bond_jax.log_probs import log_probs
from bond_jax.sampling import sample
from bond_jax.types import Prompts

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint', 'last', 'The step to judge: "last", "best" or a number.'
)
_KEY_STREAM = 2  # apart from training's and validation's keys


def make_draw(policy, config, tokenizer, mesh, key, own, other):
  """A function that samples from `own` and scores with `other` as well.

  Returns `draw(prompts, num, first)`: the rollout on the host, and the summed
  log-probs f32[B, num] under `own` and under `other`, in nats.
  """

  def program(own, other, prompts, first, num):
    drawn = sample(
        policy, own, prompts, key, num=num, length=config.length,
        stop_ids=(tokenizer.eos_id,), first=first,
    )  # fmt: skip
    there = log_probs(
        policy, other, prompts, drawn.completion, drawn.mask,
        chunk=config.chunk,
    )  # fmt: skip
    return drawn, drawn.log_prob.sum(-1), there.sum(-1)

  jitted = jax.jit(
    program, static_argnums=4, out_shardings=sharding.by_row(mesh)
  )

  def draw(prompts: Prompts, num: int, first: int):
    return jax.device_get(
      jitted(own, other, sharding.put_batch(prompts, mesh), first, num)
    )

  return draw


def records(
  draw, judges, tokenizer, prompts, *, who, count, chunk, writer, done
):
  """Yields the rows of completions.jsonl of one side, `count` per prompt."""
  for first in range(0, count, chunk):
    with writer.phase('sample'):
      drawn, here, there = draw(prompts, chunk, first)
    with writer.phase('judge'):
      texts = build.texts(tokenizer, prompts, drawn)
      scores = {k: rewards.call(f, *texts) for k, f in judges.items()}
    log_policy, log_reference = (
      (here, there) if who == 'policy' else (there, here)
    )
    writer.advance(done + first + chunk)
    for b, prompt in enumerate(texts[0]):
      for k in range(chunk):
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
          truncated=bool(
            drawn.completion[b, k, length - 1] != tokenizer.eos_id
          ),
        )


def evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
  """Draws, judges and reports; returns the summary of the whole run."""
  settings = config.evaluate
  mesh = sharding.make_mesh(**config.mesh)
  sharding.check_batch('evaluate.prompts', settings.prompts, mesh, 1)
  tokenizer = build.load_tokenizer(workdir)
  policy = build.make_policy(config)
  reference = build.load_params(policy, workdir, 'sft', 'last', mesh)
  trained = build.load_params(policy, workdir, 'train', _CHECKPOINT.value, mesh)
  judges = dict(
    reward=build.make_reward(config.reward, workdir),
    vader=build.make_reward(config.gold, workdir),
  )
  prompts = data.fixed_openings(
      build.rows(config, 'test'), tokenizer, opening=config.opening,
      count=settings.prompts,
  )  # fmt: skip
  key = jax.random.key(config.seed + _KEY_STREAM)
  sides = (
    ('policy', settings.policy_completions, trained, reference),
    ('reference', settings.reference_completions, reference, trained),
  )
  folder = os.path.join(workdir, 'evaluate')
  total = sum(count for _, count, _, _ in sides)
  rows, done = [], 0
  with metrics.Writer(folder, 'evaluate', total) as writer:
    for i, (who, count, own, other) in enumerate(sides):
      draw = make_draw(
          policy, config, tokenizer, mesh, jax.random.fold_in(key, i), own,
          other,
      )  # fmt: skip
      rows += records(
          draw, judges, tokenizer, prompts, who=who, count=count,
          chunk=settings.at_once, writer=writer, done=done,
      )  # fmt: skip
      done += count
    with writer.phase('report'):
      write_records(os.path.join(workdir, 'completions.jsonl'), rows)
      summary = measures.summarise(rows)
    writer.write(total, {})
  summary |= history(workdir)
  draw_report(config, workdir, rows, summary)
  return summary


def write_records(path: str, rows: list[dict[str, Any]]) -> None:
  """Writes JSON lines, whole or not at all."""
  with open(path + '.tmp', 'w', encoding='utf-8') as f:
    f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
  os.replace(path + '.tmp', path)


def history(workdir: str) -> dict[str, Any]:
  """What the earlier stages, and this one, took and left behind."""
  stages = ('sft', 'reward', 'train')
  summaries = {
    name: command.read_json(os.path.join(workdir, name, 'summary.json'))
    for name in stages
  }
  own = metrics.phase_seconds(stage_rows(workdir, 'evaluate'))
  phases = {
    f'{name}/{phase}': seconds
    for name in ('sft', 'train')
    for phase, seconds in summaries[name]['phase_seconds'].items()
  }
  phases['reward/fit'] = summaries['reward']['seconds']
  phases |= {f'evaluate/{k}': round(v, 3) for k, v in own.items()}
  keys = (
      'steps', 'anchor_drift', 'signal_fires', 'compilations_after_first_step',
  )  # fmt: skip
  return {
    **{k: summaries['train'][k] for k in keys},
    'parameters': summaries['sft']['parameters'],
    'sft_validation_loss': summaries['sft']['validation_loss'],
    'reward_test_pearson': summaries['reward']['test_pearson'],
    'seconds': round(sum(phases.values()), 3),
    'phase_seconds': phases,
  }


def stage_rows(workdir: str, stage: str) -> list[dict[str, Any]]:
  return metrics.read_rows(os.path.join(workdir, stage, 'metrics.jsonl'))


def draw_report(config, workdir, rows, summary) -> None:
  """Writes report.html and its figures."""
  rewards_ = measures.grid(rows, 'reference')['reward']
  path = report.write_report(
    workdir,
    settings=config.to_dict(),
    train=stage_rows(workdir, 'train'),
    sft=stage_rows(workdir, 'sft'),
    summary=summary,
    curve=measures.best_of_n_curve(rewards_),
    samples=report.side_by_side(rows, config.evaluate.samples_shown),
  )
  print(f'the report is {path}')


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  build.stage('.', evaluate, config, workdir)


if __name__ == '__main__':
  command.run(main, __doc__)
