"""How fast J-BOND climbs: exact gradients, then one sampled gradient per move.

    PYTHONPATH=. python benchmarks/anchor_growth.py --out=runs/anchor_growth

If the policy were Best-of-2 of the anchor before each of the anchor's moves,
and the anchor moved in logit space, the anchor would be Best-of-m of the
reference with log m growing by log(1 + rate) per move; with J-BOND's crude
reward in the place of the log-quantile, by 0.97 of that (Jeffreys weight 0.5)
or 0.955 (backward KL alone). Here a transformer is trained on the enumerable
language until it solves J-BOND's problem, exact gradient by exact gradient,
before each move of an anchor that moves in the space of parameters.

m is the N of the exact Best-of-N with the same win rate, and the linear range
is log 2 to log 6: below, the anchor is too near the reference, above, there
are too few completions. Then the ordinary loop, one sampled gradient per
move, for its lag. Ten minutes on two cores. Writes figure.png, summary.json.
"""

import argparse
import os

import jax
import jax.numpy as jnp
import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np
import optax

from benchmarks import exact_gradients, objectives
from bond_jax.devices import sharding
from bond_jax.evaluation import plotting
from bond_jax.measures import exact
from bond_jax.runs import environment, files, log, paths, show, stages
from bond_jax.training import checks, distil
from bond_jax.training.tasks import enumerable
from configs import enumerable as config_file

RATE, MOVES = 0.1, 24
FIRST = 600  # exact steps before the first move
LINEAR = np.log(2), np.log(6)
EXPECTED = {0.5: 0.97, 1.0: 0.955}  # of log(1 + rate) per move


def get_config():
  config = config_file.get_config('algorithm=jbond')
  # Two tokens out of 54: 2,863 completions, none of them with much mass, as
  # the theory's continuum has none.
  config.length, config.chunk = 2, 1024
  config.enumerable.update(prompts=2, vocab=54)
  return config


def growth(backward_weight: float, inner: int) -> np.ndarray:
  """log m of the anchor before each move, f64[MOVES + 1]."""
  found = []
  for move, (anchor, _) in enumerate(
    exact_gradients.descend(
      get_config(),
      backward_weight=backward_weight,
      rate=RATE,
      moves=MOVES,
      first=FIRST,
      inner=inner,
      optimizer=optax.adam(1e-3),
    )
  ):
    # At the start the anchor wins half the time, a rounding more or less.
    found.append(np.log(anchor.get('effective_n', 1.0)))
    print(f'weight {backward_weight}: move {move}, log m {found[-1]:.4f}')
  return np.array(found)


def table_growth(backward_weight: float) -> np.ndarray:
  """The same of free logits, the anchor mixed in logit space."""
  config = get_config()
  task = enumerable.make(
    stages.Run(config, '', sharding.make_mesh(data=1, model=1))
  )
  known = enumerable.know(config, task.policy, task.frozen)

  def loss(logits, log_anchor, terms):
    return objectives.bond(
      jax.nn.log_softmax(logits, -1),
      log_anchor,
      *terms,
      backward_weight=backward_weight,
      drift_weight=0.0,
    )

  optimizer = optax.adam(optax.cosine_decay_schedule(0.02, 2500))

  @jax.jit
  def solve(log_anchor, terms):
    def step(carry, _):
      logits, state = carry
      gradient = jax.grad(loss)(logits, log_anchor, terms)
      changes, state = optimizer.update(gradient, state)
      return (optax.apply_updates(logits, changes), state), None

    start = log_anchor, optimizer.init(log_anchor)
    (logits, _), _ = jax.lax.scan(step, start, None, 2500)
    mixed = (1 - RATE) * log_anchor + RATE * jax.nn.log_softmax(logits, -1)
    return jax.nn.log_softmax(mixed, -1)

  found = []
  with jax.enable_x64(True):
    anchor = jnp.asarray(known.log_reference)
    for _ in range(MOVES + 1):
      on_host = np.asarray(anchor)
      row = exact.measure(on_host, known)
      found.append(np.log(row.get('effective_n', 1.0)))
      terms = objectives.jbond_terms(on_host, known.reward, 2)
      anchor = solve(anchor, terms)
  return np.array(found)


def sampled(config, workdir: str) -> np.ndarray:
  """[moves, log m of the policy] at each probe of an ordinary run."""
  config.train.steps, config.train.save_every = 500, 20
  stages.stage(
    'train',
    distil.train,
    config,
    workdir,
    folder='train',
    open_run=checks.open_run,
  )
  rows = log.read_rows(os.path.join(workdir, 'train', 'metrics.jsonl'))
  found = [(r['step'], r['effective_n']) for r in rows if 'effective_n' in r]
  steps, ns = np.array(found).T
  return np.stack([steps, np.log(ns)])


def slope(moves: np.ndarray, log_m: np.ndarray) -> float:
  """Least squares over the linear range."""
  inside = (log_m >= LINEAR[0]) & (log_m <= LINEAR[1])
  return float(np.polyfit(moves[inside], log_m[inside], 1)[0])


def draw(curves, path: str) -> None:
  with mpl.rc_context(plotting.style(plotting.LIGHT)):
    figure = Figure(figsize=(5, 3.6), layout='constrained')
    ax = figure.add_subplot()
    for (label, (x, y)), colour in zip(
      curves.items(), plotting.LIGHT['colours'], strict=False
    ):
      ax.plot(x, y, color=colour, label=label)
    x = np.linspace(0, 3)
    for who, start in (('anchor', 0.0), ('policy', np.log(2))):
      ax.plot(x, x + start, ':', color=plotting.LIGHT['ink'], lw=1)
      ax.annotate(f'theory, {who}', (1.9, 1.9 + start), ha='right', fontsize=7)
    for level in LINEAR:
      ax.axhline(level, color=plotting.LIGHT['faint'], lw=1)
    ax.set(
      xlabel='moves x log(1 + rate)', ylabel='log m', xlim=(0, 3), ylim=(0, 3)
    )
    ax.legend()
    figure.savefig(path, dpi=160)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', type=paths.expanded, required=True)
  parser.add_argument(
    '--inner', type=int, default=200, help='exact steps before each move'
  )
  args = parser.parse_args()
  out = args.out
  environment.configure_jax()
  os.makedirs(out, exist_ok=True)
  rows, curves, moves = {}, {}, np.arange(MOVES + 1)
  for weight, share in EXPECTED.items():
    log_m = growth(weight, args.inner)
    found = slope(moves, log_m) / np.log1p(RATE)
    label = f'exact, anchor, weight {weight:g}'
    rows[label] = {'slope': found, 'expected': share, 'ratio': found / share}
    curves[label] = moves * np.log1p(RATE), log_m
    label, log_m = f'table, anchor, weight {weight:g}', table_growth(weight)
    found = slope(moves, log_m) / np.log1p(RATE)
    rows[label] = {'slope': found, 'expected': share, 'ratio': found / share}
    curves[label] = moves * np.log1p(RATE), log_m
  config = get_config()
  steps, log_m = sampled(config, os.path.join(out, 'sampled'))
  rate = config.algorithm.args.anchor_rate
  found = slope(steps, log_m) / np.log1p(rate)
  label = 'sampled, policy, weight 0.5'
  rows[label] = {'slope': found, 'expected': 0.97, 'ratio': found / 0.97}
  curves[label] = steps * np.log1p(rate), log_m
  draw(curves, os.path.join(out, 'figure.png'))
  series = {k: np.stack(v).tolist() for k, v in curves.items()}
  files.write_json(
    os.path.join(out, 'summary.json'), {'slopes': rows, 'curves': series}
  )
  table = [(k, *row.values()) for k, row in rows.items()]
  show.table(
    [('', 'slope / log(1 + rate)', 'expected', 'ratio'), *table], f'in {out}'
  )


if __name__ == '__main__':
  main()
