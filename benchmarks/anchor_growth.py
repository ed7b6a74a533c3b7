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
import functools
import os

import jax
import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np
import optax

from bond_jax import (
  anchors,
  build,
  command,
  enumerable,
  figures,
  measures,
  metrics,
  objectives,
  sharding,
  train,
)
from configs import enumerable as config_file

RATE, MOVES = 0.1, 24
FIRST, INNER = 600, 60  # exact steps before the first move, before the others
LINEAR = np.log(2), np.log(6)
EXPECTED = {0.5: 0.97, 1.0: 0.955}  # of log(1 + rate) per move


def get_config():
  config = config_file.get_config('algorithm=jbond')
  config.enumerable.prompts = 2
  return config


def exact(config, backward_weight: float) -> np.ndarray:
  """log m of the anchor before each move, f64[MOVES + 1]."""
  settings = config.enumerable
  task = enumerable.make(config, '', sharding.make_mesh(data=1, model=1))
  tokens, mask = enumerable.completions(settings.vocab, config.length)
  reward = enumerable.reward_table(
    settings.seed, settings.prompts, tokens, mask, settings.vocab
  )
  law = enumerable.exact_law(
    task.policy, settings.prompts, settings.vocab, config.length
  )
  log_law = jax.jit(lambda params: law(params).sum(-1))
  log_reference = np.asarray(log_law(task.reference), np.float64)
  curve = enumerable.best_of_n_curve(log_reference, reward)
  objective = functools.partial(
    objectives.jbond,
    reward=reward,
    num_anchor=2,
    backward_weight=backward_weight,
    drift_weight=0.0,
  )
  optimizer = optax.adam(1e-3)

  @functools.partial(jax.jit, static_argnums=3)
  def solve(params, opt_state, log_anchor, steps):
    def step(carry, _):
      params, opt_state = carry
      gradient = jax.grad(lambda p: objective(law(p).sum(-1), log_anchor))(
        params
      )
      changes, opt_state = optimizer.update(gradient, opt_state)
      return (optax.apply_updates(params, changes), opt_state), None

    return jax.lax.scan(step, (params, opt_state), None, steps)[0]

  def log_m(params):
    policy = np.exp(np.asarray(log_law(params), np.float64))
    rate = enumerable.win_rate(policy, np.exp(log_reference), reward)
    n = measures.effective_n(max(rate, curve.win_rate[0]), curve)
    return np.log(n)

  params = anchor = task.reference
  state = optimizer.init(params)
  found = []
  for move in range(MOVES + 1):
    found.append(log_m(anchor))
    steps = INNER if move else FIRST
    params, state = solve(params, state, log_law(anchor), steps)
    anchor = anchors.ema(RATE).update(anchor, params, move)
    print(f'weight {backward_weight}: move {move}, log m {found[-1]:.4f}')
  return np.array(found)


def sampled(config, workdir: str) -> np.ndarray:
  """[moves, log m of the policy] at each probe of an ordinary run."""
  config.train.steps, config.train.save_every = 500, 20
  build.stage('train', train.train, config, workdir, folder='train')
  rows = metrics.read_rows(os.path.join(workdir, 'train', 'metrics.jsonl'))
  found = [(r['step'], r['effective_n']) for r in rows if 'effective_n' in r]
  steps, ns = np.array(found).T
  return np.stack([steps, np.log(ns)])


def slope(moves: np.ndarray, log_m: np.ndarray) -> float:
  """Least squares over the linear range."""
  inside = (log_m >= LINEAR[0]) & (log_m <= LINEAR[1])
  return float(np.polyfit(moves[inside], log_m[inside], 1)[0])


def draw(curves, path: str) -> None:
  with mpl.rc_context(figures.style(figures.LIGHT)):
    figure = Figure(figsize=(5, 3.6), layout='constrained')
    ax = figure.add_subplot()
    for (label, (x, y)), colour in zip(
      curves.items(), figures.LIGHT['colours'], strict=False
    ):
      ax.plot(x, y, color=colour, label=label)
    x = np.linspace(0, ax.get_xlim()[1])
    ax.plot(x, x + LINEAR[0], ':', color=figures.LIGHT['ink'], label='theory')
    for level in LINEAR:
      ax.axhline(level, color=figures.LIGHT['faint'], lw=1)
    ax.set(xlabel='moves x log(1 + rate)', ylabel='log m', ylim=(0, 3))
    ax.legend()
    figure.savefig(path, dpi=160)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  out = parser.parse_args().out
  build.configure_jax()
  os.makedirs(out, exist_ok=True)
  rows, curves, moves = {}, {}, np.arange(MOVES + 1)
  for weight, share in EXPECTED.items():
    log_m = exact(get_config(), weight)
    found = slope(moves, log_m) / np.log1p(RATE)
    label = f'exact, anchor, weight {weight:g}'
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
  command.write_json(
    os.path.join(out, 'summary.json'), {'slopes': rows, 'curves': series}
  )
  table = [(k, *row.values()) for k, row in rows.items()]
  metrics.table(
    [('', 'slope / log(1 + rate)', 'expected', 'ratio'), *table], f'in {out}'
  )


if __name__ == '__main__':
  main()
