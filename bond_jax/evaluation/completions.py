"""Completions of held-out prompts, drawn, scored under both sides and judged.

Rows go to a file call by call, so that an evaluation that was killed goes on
with the call that it was at: a completion depends on the seed, its prompt and
its number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
import json
import os
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
  base: Params  # under adapters, else {}


def make_draw(config, stop: Stop, mesh):
  """A function that samples from `own` and scores with `other` as well.

  Returns `draw(own, other, prompts, key, first, num)`: the rollout on the host,
  of `num` completions of each prompt from number `first` on, and their summed
  log-probs f32[B, num] under `own` and under `other`, in nats.
  """
  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)

  @functools.cache
  def program(own: Policy, other: Policy):
    def evaluate(mine, theirs, prompts, key, first, num):
      drawn = sampling.sample(
          lora.over(own, mine[1]), mine[0], prompts, key, num=num,
          length=config.length, stop=stop, first=first,
          slots=config.slots, mesh=sampling_mesh,
      )  # fmt: skip
      there = log_probs(
          lora.over(other, theirs[1]), theirs[0], prompts, drawn.completion,
          drawn.mask, chunk=config.chunk,
      )  # fmt: skip
      return drawn, drawn.log_prob.sum(-1), there.sum(-1)

    return jax.jit(
      evaluate, static_argnames='num', out_shardings=sharding.by_row(mesh)
    )

  def draw(own: Model, other: Model, prompts: Prompts, key, first, num):
    on_mesh = sharding.put_batch(prompts, mesh)
    run = program(own.policy, other.policy)
    return shares.fetch(run(own[1:], other[1:], on_mesh, key, first, num=num))

  return draw


def made_of(folder: str) -> dict[str, str]:
  """What the rows of an evaluation depend on, as far as it was begun."""
  path = os.path.join(folder, 'inputs.json')
  return files.read_json(path) if os.path.exists(path) else {}


def begin(path: str, folder: str, inputs: Mapping[str, str]) -> None:
  """Records what rows are made of; sets aside those made of something else.

  Args:
    path: of the rows.
    folder: of the record.
    inputs: as `provenance.of_evaluation`.
  """
  lines = fingerprints.changed(made_of(folder), inputs)
  if os.path.exists(path) and lines:
    aside = f'{path}.before'
    os.replace(path, aside)
    print(
      f'evaluate: {path} was begun with other inputs ({"; ".join(lines[:5])}):'
      f' all is drawn and judged anew. Its rows are now in {aside}.',
      flush=True,
    )
  os.makedirs(folder, exist_ok=True)
  files.write_json(os.path.join(folder, 'inputs.json'), dict(inputs))


class Side(NamedTuple):
  """What is drawn of one side."""

  who: str  # 'policy' or 'reference'
  count: int  # completions of each prompt
  draw: Callable[[int, int], Any]  # (first, num) -> as make_draw's


def calls(sides: Sequence[Side], at_once: int) -> list[tuple[Side, int, int]]:
  """All calls of an evaluation in their order: side, first, num."""
  return [
    (side, first, min(at_once, side.count - first))
    for side in sides
    for first in range(0, side.count, at_once)
  ]


def collect(
  path: str, sides: Sequence[Side], judge, prompts: Prompts, *, at_once: int,
  writer_of: Callable[[int | None], log.Writer],
) -> list[Row]:  # fmt: skip
  """Writes the rows of all calls to `path`, less those that are there.

  Returns all of them, on the host that wrote them.

  Args:
    path: of JSON lines; the first host's.
    sides: what to draw.
    judge: (prompts, rollout) -> texts and scores, see `make_judge`.
    prompts: on all hosts.
    at_once: completions of each prompt in a call.
    writer_of: completions per prompt that are there, or None -> the writer of
      the stage's metrics.
  """
  todo = calls(sides, at_once)
  sizes = [num * len(prompts.id) for _, _, num in todo]
  done = hosts.once(lambda: keep_whole(path, sizes))
  drawn = sum(num for _, _, num in todo[:done])
  if done:
    hosts.say(f'evaluate: goes on after {drawn} completions of each prompt')
  with writer_of(drawn or None) as writer:
    for side, first, num in todo[done:]:
      with writer.phase('sample'):
        rollout, here, there = side.draw(first, num)
      with writer.phase('judge'):
        texts, scores = judge(prompts, rollout)
      if hosts.first():
        rows = records(side.who, prompts, rollout, here, there, texts, scores)
        append(path, list(rows))
      drawn += num
      writer.write(drawn, {'tokens/decoded': rollout.mask.sum()})
  return log.read_rows(path) if hosts.first() else []


def make_judge(judges: Mapping[str, Any], read, own: np.ndarray):
  """(prompts, rollout) -> what they read, and the scores f[B, num] by name.

  The judges of this host are asked about the prompts in `own`.
  """

  def judge(prompts: Prompts, rollout):
    texts = read(prompts, rollout)
    mine = calling.some(own, *texts)
    ask = lambda: {name: judge(*mine) for name, judge in judges.items()}
    scores = shares.over(own, ask)
    check_scores(scores)
    return texts, scores

  return judge


def check_scores(scores: dict[str, np.ndarray]) -> None:
  """Refuses judges of pairs: what is reported are numbers of completions."""
  for name, value in scores.items():
    if value.ndim == 3:
      raise UserError(
        f'{name} compares pairs, and evaluation needs a number for each'
        ' completion: with reward.opponents = 4 it is how often a completion'
        " beats four of the reference's; gold must be a reward."
      )


def records(who, prompts, rollout, here, there, texts, scores) -> Iterator[Row]:
  """The rows of completions.jsonl of one call; see `measures.RECORD_KEYS`."""
  log_policy, log_reference = (
    (here, there) if who == 'policy' else (there, here)
  )
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
  """Cuts off what a killed call has left; returns how many calls are whole.

  Args:
    path: of the rows; it need not exist.
    sizes: rows of each call, in order.
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
