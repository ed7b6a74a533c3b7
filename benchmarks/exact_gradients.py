"""J-BOND without noise: exact gradients on the enumerable language."""

import functools

import jax
import optax

from benchmarks import objectives
from bond_jax.algorithms.parts import anchors
from bond_jax.devices import sharding
from bond_jax.measures import exact
from bond_jax.runs import stages
from bond_jax.training.tasks import enumerable


def descend(config, **args):
  """Yields the exact measures of the anchor and the policy before each move.

  Arguments as those of `laws`.
  """
  task = enumerable.make(
    stages.Run(config, '', sharding.make_mesh(data=1, model=1))
  )
  known = enumerable.know(config, task.policy, task.frozen)
  for both in laws(config, **args):
    yield tuple(exact.measure(law, known) for law in both)


def laws(config, *, backward_weight, rate, moves, first, inner, optimizer):
  """Yields the laws of the anchor and the policy before each move.

  f64[X, Y], natural logarithms.

  Args:
    config: of configs/enumerable.py.
    backward_weight, rate: J-BOND's Jeffreys weight and anchor rate.
    moves: of the anchor.
    first, inner: exact gradient steps before the first move, and before each
      of the others.
    optimizer: of optax.
  """
  task = enumerable.make(
    stages.Run(config, '', sharding.make_mesh(data=1, model=1))
  )
  known = enumerable.know(config, task.policy, task.frozen)
  log_law = enumerable.log_law(config, task.policy)
  law = enumerable.exact_law(config, task.policy)
  objective = functools.partial(
    objectives.bond, backward_weight=backward_weight, drift_weight=0.0
  )

  @functools.partial(jax.jit, static_argnums=4)
  def solve(params, opt_state, log_anchor, terms, steps):
    def step(carry, _):
      params, opt_state = carry
      loss = lambda p: objective(law(p).sum(-1), log_anchor, *terms)
      changes, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
      return (optax.apply_updates(params, changes), opt_state), None

    return jax.lax.scan(step, (params, opt_state), None, steps)[0]

  params = anchor = task.frozen.reference
  state = optimizer.init(params)
  for move in range(moves + 1):
    steps = inner if move else first
    log_anchor = log_law(anchor)
    terms = objectives.jbond_terms(log_anchor, known.reward, 2)
    params, state = solve(params, state, log_anchor, terms, steps)
    yield tuple(log_law(p) for p in (anchor, params))
    anchor = anchors.ema(rate).update(anchor, params, move)
