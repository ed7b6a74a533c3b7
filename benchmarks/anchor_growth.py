"""How fast J-BOND's anchor climbs when nothing is noisy.

    python benchmarks/anchor_growth.py --out=runs/anchor_growth

On the enumerable language, with a real transformer, every gradient is the
exact one, and before each move of the anchor the policy is trained until it
solves J-BOND's problem at that anchor. If the policy were Best-of-2 of the
anchor and the anchor moved in logit space, the anchor would be Best-of-m of
the reference with log m growing by log(1 + rate) per move; with J-BOND's crude
reward, by 0.97 of that (Jeffreys 0.5) or 0.955 of it (backward alone).
Prints the slope of log m against the moves, and writes it to DIR.
"""

import functools
import json
import os
import sys
import time

from absl import app, flags
import jax
import numpy as np
import optax

from bond_jax import anchors, build, enumerable, objectives, sharding
from ml_collections import config_flags

_OUT = flags.DEFINE_string('out', None, 'Folder of the result.', required=True)
_RATE = flags.DEFINE_float('rate', 0.05, "The anchor's rate.")
_MOVES = flags.DEFINE_integer('moves', 60, 'Moves of the anchor.')
_INNER = flags.DEFINE_integer('inner', 60, 'Exact steps before each move.')
_FIRST = flags.DEFINE_integer('first', 600, 'Exact steps before the first.')
_CONFIG = config_flags.DEFINE_config_file('config', 'configs/enumerable.py')


def growth(config, backward_weight, rate, moves, inner, first):
  """log m of the anchor after each move: f64[moves + 1], and of the policy."""
  settings = config.enumerable
  task = enumerable.make(config, '', sharding.make_mesh(data=1, model=1))
  tokens, mask = enumerable.completions(settings.vocab, config.length)
  reward = enumerable.reward_table(
    settings.seed, settings.prompts, tokens, mask, settings.vocab
  )
  law = enumerable.exact_law(
    task.policy, settings.prompts, settings.vocab, config.length
  )
  log_law = jax.jit(lambda p: law(p).sum(-1))
  log_reference = np.asarray(log_law(task.reference), np.float64)
  curve = enumerable.best_of_n_curve(log_reference, reward)
  objective = functools.partial(
    objectives.jbond,
    reward=reward,
    num_anchor=2,
    backward_weight=backward_weight,
    drift_weight=0.0,
  )
  optimizer = optax.adam(optax.schedules.constant_schedule(1e-3))

  @functools.partial(jax.jit, static_argnums=3)
  def solve(params, opt_state, log_anchor, steps):
    def step(carry, _):
      params, opt_state = carry
      loss = lambda p: objective(law(p).sum(-1), log_anchor)
      value, gradient = jax.value_and_grad(loss)(params)
      changes, opt_state = optimizer.update(gradient, opt_state)
      return (optax.apply_updates(params, changes), opt_state), value

    return jax.lax.scan(step, (params, opt_state), None, steps)

  def log_m(params):
    rate_ = enumerable.win_rate(
      np.exp(np.asarray(log_law(params), np.float64)),
      np.exp(log_reference),
      reward,
    )
    n = enumerable.measures.effective_n(rate_, curve)
    return np.nan if n is None else np.log(n)

  params = anchor = task.reference
  opt_state = optimizer.init(params)
  rows = []
  for move in range(moves + 1):
    steps = inner if move else first
    (params, opt_state), values = solve(
      params, opt_state, log_law(anchor), steps
    )
    rows.append((log_m(anchor), log_m(params), float(values[-1])))
    anchor = anchors.ema(rate).update(anchor, params, move)
    print(move, *(f'{x:.4f}' for x in rows[-1]), flush=True)
  return np.array(rows)


def main(argv):
  del argv
  build.configure_jax()
  rate, out = _RATE.value, {}
  for backward_weight in (0.5, 1.0):
    start = time.time()
    rows = growth(
        _CONFIG.value, backward_weight, rate, _MOVES.value, _INNER.value,
        _FIRST.value,
    )  # fmt: skip
    print(backward_weight, time.time() - start)
    out[str(backward_weight)] = rows.tolist()
  os.makedirs(_OUT.value, exist_ok=True)
  with open(os.path.join(_OUT.value, 'summary.json'), 'w') as f:
    json.dump(out, f)


if __name__ == '__main__':
  sys.exit(app.run(main))
