"""Saving and restoring a run: the train state and the data iterator.

Orbax writes asynchronously and commits a step by renaming its folder, so a
process killed inside a save leaves the step before it intact.
"""

from collections.abc import Sequence
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.runs.checkpoints import checksums
from bond_jax.types import Params, TrainState

_KEEP = 2  # newest checkpoints that stay


def manager(folder: str) -> ocp.CheckpointManager:
  """Of a folder, made if absent; the last _KEEP steps stay, and the best."""
  options = ocp.CheckpointManagerOptions(
    preservation_policy=_Kept(),
    best_fn=_score,
    enable_async_checkpointing=True,
    temporary_path_class=checksums.TemporaryPath,
  )
  folder = os.path.abspath(folder)
  try:
    return ocp.CheckpointManager(folder, options=options)
  except ValueError:  # a step's scores are not JSON
    for step in checksums.steps(folder):
      checksums.check(folder, step, ('metrics',))
    raise


def _score(metrics: dict[str, float | None]) -> float:
  return -math.inf if metrics['score'] is None else metrics['score']


class _Kept:
  """Keeps the last and the best of those with a score, and the newest.

  One that was saved on request has no score: it goes when the next is there,
  and the others stay as they would have without it.
  """

  def should_preserve(self, checkpoints: Sequence[Any], **_) -> list[bool]:
    last = len(checkpoints) - 1
    scored = [
      i
      for i, info in enumerate(checkpoints)
      if info.metrics and info.metrics['score'] is not None
    ]
    best = sorted(scored, key=lambda i: checkpoints[i].metrics['score'])[-1:]
    kept = {*scored[-_KEEP:], *best, last}
    return [i in kept for i in range(len(checkpoints))]


def save(
  checkpoints: ocp.CheckpointManager,
  step: int,
  state: TrainState,
  data: dict[str, Any],
  score: float | None,
  facts: dict[str, Any] | None = None,
) -> None:
  """Saves `state`, `data` and `facts` (JSON); returns before it is written.

  The highest score marks the best step; without one the step stays until the
  next one is saved. The parameters are an item of their own, for readers that
  want them alone. A UserError if anything in the state is not finite.
  """
  if names := broken(state._asdict()):
    raise UserError(
      f'step {step}: not finite are {", ".join(names[:3])}'
      f'{f" and {len(names) - 3} more" if len(names) > 3 else ""}. Nothing was'
      f' saved after the last checkpoint in {checkpoints.directory}.'
    )
  checkpoints.save(
    step,
    args=ocp.args.Composite(
      params=ocp.args.StandardSave(state.params),
      rest=ocp.args.StandardSave(state._replace(params={})._asdict()),
      data=ocp.args.JsonSave(data),
      facts=ocp.args.JsonSave(facts or {}),
    ),
    metrics={'score': None if score is None else float(score)},
  )


@jax.jit
def not_finite(tree: Any) -> Any:
  """Whether each array of a tree holds anything that is not finite: bool[]."""
  return jax.tree.map(lambda x: ~jnp.isfinite(x).all(), tree)


def broken(tree: Any) -> list[str]:
  """The paths of arrays that hold anything that is not finite."""
  flags = jax.device_get(not_finite(tree))
  return [
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, bad in jax.tree_util.tree_leaves_with_path(flags)
    if bad
  ]


def restore(
  checkpoints: ocp.CheckpointManager, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
  """Restores the last step into the shapes and shardings of `like`.

  Returns the state, and the JSON dict that was saved with it.
  """
  out = checkpoints.restore(
    hosts.once(checkpoints.latest_step),
    args=ocp.args.Composite(
      params=ocp.args.StandardRestore(like.params),
      rest=ocp.args.StandardRestore(like._replace(params={})._asdict()),
      data=ocp.args.JsonRestore(),
    ),
  )
  state = TrainState(**{**out['rest'], 'params': out['params']})
  return state, out['data']


def read_facts(checkpoints: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  """The `facts` that `save` was given."""
  args = ocp.args.Composite(facts=ocp.args.JsonRestore())
  return checkpoints.restore(step, args=args)['facts']


def restore_params(
  checkpoints: ocp.CheckpointManager, like: Params, step: int
) -> Params:
  """Restores the policy of a step alone, into the shardings of `like`.

  A UserError if its files are not as they were written.
  """
  folder = os.fspath(checkpoints.directory)
  hosts.once(lambda: checksums.check(folder, step, ('params',)))
  args = ocp.args.Composite(params=ocp.args.StandardRestore(like))
  return checkpoints.restore(step, args=args)['params']


def choose(checkpoints: ocp.CheckpointManager, which: str) -> int:
  """The step of 'last', 'best' or a number; a UserError if it is absent."""

  def find() -> int:
    steps = sorted(checkpoints.all_steps())
    if not steps:
      raise UserError(
        f'{checkpoints.directory} holds no checkpoint; run the stage that'
        ' writes it first.'
      )
    known = {str(step): step for step in steps} | {'last': steps[-1]}
    known['best'] = checkpoints.best_step() or steps[-1]
    if which not in known:
      raise UserError(
        f'checkpoint {which!r} is not in {checkpoints.directory}; there are'
        f' {", ".join(map(str, steps))}, and "last" and "best".'
      )
    return known[which]

  return hosts.once(find)
