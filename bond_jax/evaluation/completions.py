"""Completions of held-out prompts, drawn, scored under both sides and judged.

Each call appends its rows to a file. A completion depends only on the seed, its
prompt and its number, so a killed evaluation resumes at the call it was in.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import json
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from bond_jax.devices import hosts, sharding, shares
from bond_jax.errors import UserError
from bond_jax.models import lora, sampling
from bond_jax.models.log_probs import log_probs
from bond_jax.models.stops import Stop
from bond_jax.rewards import calling
from bond_jax.runs import files, fingerprints, log
from bond_jax.types import Params, Policy, Prompts

Row = dict[str, Any]


class Model(NamedTuple):
  """A side of the comparison, in its shards."""

  policy: Policy
  params: Params
  base: Params  # that adapters are added to, else {}


def make_draw(config, stop: Stop, mesh):
  """A function that samples from `own` and scores with `other` as well.

  Returns `draw(own, other, prompts, key, first, num)`: the rollout of `num`
  completions of each prompt, the first of them number `first`, and their summed
  log-probs f32[B, num] under `own` and under `other`, in nats; on the host.
  """
  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)
  limits = sampling.Limits(config.length, stop, config.slots, sampling_mesh)

  @functools.cache
  def program(own: Policy, other: Policy):
    def evaluate(own_weights, other_weights, prompts, key, first, num):
      params, base = own_weights
      drawn = sampling.sample(
          lora.over(own, base), params, prompts, key, limits, num=num,
          first=first,
      )  # fmt: skip
      params, base = other_weights
      under_other = log_probs(
          lora.over(other, base), params, prompts, drawn.completion,
          drawn.mask, chunk=config.chunk,
      )  # fmt: skip
      return drawn, drawn.log_prob.sum(-1), under_other.sum(-1)

    return jax.jit(
      evaluate, static_argnames='num', out_shardings=sharding.by_row(mesh)
    )

  def draw(own: Model, other: Model, prompts: Prompts, key, first, num):
    on_mesh = sharding.put_batch(prompts, mesh)
    run = program(own.policy, other.policy)
    return shares.fetch(run(own[1:], other[1:], on_mesh, key, first, num=num))

  return draw


def inputs_of(folder: str) -> dict[str, str]:
  """The recorded inputs of an evaluation; {} if it has not begun."""
  path = os.path.join(folder, 'inputs.json')
  return files.read_json(path) if os.path.exists(path) else {}


def begin(
  path: str, folder: str, inputs: Mapping[str, str], stage: str = 'evaluate'
) -> None:
  """Records the `inputs` of the rows at `path`; sets aside rows of others.

  `folder` gets the record; `inputs` are those of `provenance.of_evaluation`.
  """
  lines = fingerprints.changed(inputs_of(folder), inputs)
  if os.path.exists(path) and lines:
    aside = f'{path}.before'
    os.replace(path, aside)
    print(
      f'{stage}: {path} was begun with other inputs ({"; ".join(lines[:5])}):'
      f' all is drawn and judged anew. Its rows are now in {aside}.',
      flush=True,
    )
  os.makedirs(folder, exist_ok=True)
  files.write_json(os.path.join(folder, 'inputs.json'), dict(inputs))


class Side(NamedTuple):
  """The completions to draw of one side."""

  who: str  # 'policy' or 'reference'
  count: int  # completions of each prompt
  draw: Callable[[int, int], Any]  # (first, num) -> as make_draw's


def collect(
  path: str, sides: Sequence[Side], judge, prompts: Prompts, *, at_once: int,
  minutes: float, writer_of: Callable[[int | None], log.Writer],
) -> list[Row]:  # fmt: skip
  """Appends the rows of all calls that `path` lacks, or of those in time.

  Returns all rows on the first host, and none on the others.

  Args:
    path: of JSON lines, on the first host.
    sides: to draw.
    judge: of `make_judge`.
    prompts: on all hosts.
    at_once: completions of each prompt in a call.
    minutes: after which no call is begun, but for the two completions of each
      side that a report needs; 0 = all are made.
    writer_of: completions per prompt already there, or None -> the writer of
      the stage's metrics.
  """
  todo = [
    (side, first, min(at_once, side.count - first))
    for side in sides
    for first in range(0, side.count, at_once)
  ]
  if minutes:  # all sides get their share of it
    todo.sort(key=lambda call: call[1] / call[0].count)
  sizes = [num * len(prompts.id) for _, _, num in todo]
  done = hosts.once(lambda: keep_whole(path, sizes))
  drawn = sum(num for _, _, num in todo[:done])
  if done:
    hosts.say(f'evaluate: goes on after {drawn} completions of each prompt')
  end = time.monotonic() + 60 * minutes
  with writer_of(drawn or None) as writer:
    for side, first, num in todo[done:]:
      if minutes and first > 1 and hosts.once(lambda: time.monotonic() > end):
        break
      with writer.phase('sample'):
        rollout, *under = side.draw(first, num)
      with writer.phase('judge'):
        texts, scores = judge(prompts, rollout)
      if hosts.first():
        rows = records(side.who, prompts, rollout, under, texts, scores)
        append(path, list(rows))
      drawn += num
      writer.write(drawn, {'tokens/decoded': rollout.mask.sum()})
  return log.read_rows(path) if hosts.first() else []


def make_judge(judges: Mapping[str, Any], read, own: np.ndarray):
  """(prompts, rollout) -> the texts, and the scores f[B, num] by name.

  The judges of this host score the prompts in `own`. A UserError if one judges
  pairs: an evaluation reports numbers of single completions.
  """

  def judge(prompts: Prompts, rollout):
    texts = read(prompts, rollout)
    some = calling.some(own, *texts)
    ask = lambda: {name: judge(*some) for name, judge in judges.items()}
    scores = shares.over(own, ask)
    for name, value in scores.items():
      if value.ndim == 3:
        raise UserError(
          f'{name} compares pairs, and evaluation needs a number for each'
          ' completion: with reward.opponents = 4 it is how often a completion'
          " beats four of the reference's; gold must be a reward."
        )
    return texts, scores

  return judge


def records(who, prompts, rollout, log_probs, texts, scores) -> Iterator[Row]:
  """The rows of one call; `log_probs` are under its own side and the other.

  See `aggregate.RECORD_KEYS`.
  """
  log_policy, log_reference = log_probs if who == 'policy' else log_probs[::-1]
  for b, prompt in enumerate(texts[0]):
    for k in range(rollout.mask.shape[1]):
      yield dict(
        id=int(prompts.id[b]),
        prompt=prompt,
        completion=texts[1][b][k],
        **{name: float(value[b, k]) for name, value in scores.items()},
        log_policy=float(log_policy[b, k]),
        log_reference=float(log_reference[b, k]),
        who=who,
        length=int(rollout.mask[b, k].sum()),
        truncated=not texts[2].finished[b, k],
      )


def append(path: str, rows: Sequence[Row]) -> None:
  """Adds JSON lines, on the disk when it returns."""
  with open(path, 'a', encoding='utf-8') as f:
    f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    f.flush()
    os.fsync(f.fileno())


def keep_whole(path: str, sizes: Sequence[int]) -> int:
  """Cuts off the rows of an unfinished call; returns the finished calls.

  `path` need not exist; `sizes` are the rows of each call, in order.
  """
  if not os.path.exists(path):
    return 0
  ends = np.cumsum([0, *sizes])
  with open(path, 'rb+') as f:
    place = [0]
    for line in f:
      if line.endswith(b'\n'):
        place.append(place[-1] + len(line))
    done = int(np.searchsorted(ends, len(place) - 1, side='right')) - 1
    f.truncate(place[ends[done]])
  return done
