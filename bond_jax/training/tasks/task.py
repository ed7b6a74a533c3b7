"""What is trained on: prompts, a reward and a probe."""

from collections.abc import Callable, Mapping
import types
from typing import Any, NamedTuple

import numpy as np

from bond_jax.models import stops
from bond_jax.rewards import calling
from bond_jax.types import Frozen, Params, Policy, Prompts, Rollout


class Task(NamedTuple):
  """What the train stage trains on, and how it is watched.

  Built by `make(run)` of the module that `config.task` names; its
  `check(config, mesh, rows)` refuses a config before any stage starts.
  """

  policy: Policy
  frozen: Frozen  # the reference, and what is under it, in their shards
  stop: stops.Stop
  batches: Any  # iterator of Prompts, with get_state() and set_state(state)
  reward: Callable[[Prompts, Rollout], calling.Scored]  # on the host
  # frozen -> probe, a function from params, and one that gives all of frozen,
  # to validation numbers, among them win_rate/reference and kl/reference
  make_probe: Callable[[Frozen], Callable[..., dict[str, float]]]
  # (prompts, visit) -> completions that were drawn before, and their rewards
  # f32[B, K], on the host, in the place of a sampler and `reward`; or None
  stored: Callable[..., tuple[Rollout, np.ndarray]] | None = None
  facts: Mapping[str, Any] = types.MappingProxyType({})  # for the summary
  # Where the reference is another model, that, and what the policy starts from.
  teacher: Policy | None = None
  start: Params | None = None
