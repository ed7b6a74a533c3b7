"""Figure 1 of Faster WIND on exact tables.

`python -m benchmarks.papers.wind_1 --out=runs/figures/wind_1` draws it.

Yang et al., "Faster WIND" (arXiv 2410.20727), compare iterative Best-of-N and
WIND on a contextual bandit. We do not know their settings; these are ours:

  a  no mixing: both go to the reference restricted to the best arms
  b  mixing: their regularised limits, apart for large beta, meet as it falls
  c  sampled WIND: KL(equilibrium || last policy) against comparisons per step
  d  the same with a win rate linear in features, where the risks may differ

Writes bandit_figure1.png, bandit_figure1.json (every number drawn, every
setting) and summary.json into --out.
"""

from __future__ import annotations

from collections.abc import Sequence
import importlib.metadata
import os
import time
from typing import Any

from absl import flags
import matplotlib as mpl
from matplotlib.figure import Figure
import numpy as np

from benchmarks.papers import bandit_samples
from bond_jax.errors import UserError
from bond_jax.evaluation import plotting
from bond_jax.measures import tables
from bond_jax.runs import paths, show
from bond_jax.runs.command import execute
from bond_jax.runs.files import write_json

SETTINGS = {
  'prompts': 20,
  'arms': 50,
  'reward': 'standard normal, one per prompt and arm',
  'reference_logits_sd': 0.5,
  'a_steps': 60,
  'a_best_of': [2, 4],
  'a_wind': [[0.0, 2.0], [0.0, 8.0], [0.05, 2.0]],  # beta, eta
  'b_betas': np.geomspace(8, 0.014, 40).round(4).tolist(),
  'c_beta': 0.2,
  'c_eta': 1.0,
  'c_steps': 40,
  'c_comparisons': [200, 1000, 5000, 25000, 125000],
  'c_runs': 6,
  'd_prompts': 8,
  'd_arms': 30,
  'd_features': 6,
  'd_preference': "1/2 + (r - r')/2, r in [0, 1] linear in features",
}
_NOTE = "settings ours: the paper's are not known to us"


# -- numbers ------------------------------------------------------------------


def distance(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
  """Total variation, over the last axis, its mean over prompts."""
  return 0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum(-1).mean(-1)


def instance(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
  """A bandit: log_reference and reward, [X, A] each."""
  size = SETTINGS['prompts'], SETTINGS['arms']
  logits = SETTINGS['reference_logits_sd'] * rng.standard_normal(size)
  return tables.normalise(logits), rng.standard_normal(size)


def linear_instance(rng: np.random.Generator):
  """log_reference, win and features such that P(y > pi) is linear in them.

  The features: some of each arm's own, and one per prompt, as P(y > pi) has
  an offset for each.
  """
  x, a, d = (SETTINGS[f'd_{k}'] for k in ('prompts', 'arms', 'features'))
  own = rng.standard_normal((x, a, d))
  reward = own @ rng.standard_normal(d)
  reward = (reward - reward.min()) / np.ptp(reward)
  win = 0.5 + 0.5 * (reward[:, :, None] - reward[:, None, :])
  prompt = np.broadcast_to(np.eye(x)[:, None], (x, a, x))
  logits = SETTINGS['reference_logits_sd'] * rng.standard_normal((x, a))
  return tables.normalise(logits), win, np.concatenate([own, prompt], -1)


def without_mixing(reference, reward) -> dict[str, list[float]]:
  """Panel a: label -> distance to the common limit at steps 0, 1, 2 ..."""
  steps, win = SETTINGS['a_steps'], tables.win_matrix(reward)
  best = reward == reward.max(-1, keepdims=True)
  limit = tables.normalise(np.where(best, reference, -np.inf))
  ways = {}
  for n in SETTINGS['a_best_of']:
    ways[f'iterative Best-of-{n}'] = tables.iterate_best_of_n(
      reference, reference, reward, n, steps
    )
  for beta, eta in SETTINGS['a_wind']:
    way = [reference]
    for _ in range(steps):
      way.append(tables.wind_step(way[-1], reference, win, beta, eta))
    ways[f'WIND, β = {beta:g}, η = {eta:g}'] = np.stack(way)
  return {k: distance(way, limit).tolist() for k, way in ways.items()}


def with_mixing(reference, reward) -> dict[str, list[float]]:
  """Panel b: distances between both equilibria and the limit, per beta."""
  win = tables.win_matrix(reward)
  best = reward == reward.max(-1, keepdims=True)
  limit = tables.normalise(np.where(best, reference, -np.inf))
  rows = []
  for beta in SETTINGS['b_betas']:
    wind = tables.wind_equilibrium(reference, win, beta)
    log_win = tables.log_win_rate_equilibrium(reference, win, beta)
    pairs = (wind, log_win), (wind, limit), (log_win, limit)
    rows.append([float(distance(p, q)) for p, q in pairs])
  names = (
    'WIND to iterative BoN',
    'WIND to the limit',
    'iterative BoN to the limit',
  )
  return dict(zip(names, np.transpose(rows).tolist(), strict=True))


def sampled(seed, reference, win, features=None, risk='squared'):
  """[comparisons, runs]: KL(equilibrium || policy after c_steps), its mean."""
  beta, eta = SETTINGS['c_beta'], SETTINGS['c_eta']
  equilibrium = tables.wind_equilibrium(reference, win, beta)
  error = np.empty((len(SETTINGS['c_comparisons']), SETTINGS['c_runs']))
  for (i, run), _ in np.ndenumerate(error):
    rng = np.random.default_rng([seed, i, run])
    policy = reference
    for _ in range(SETTINGS['c_steps']):
      policy = bandit_samples.sampled_wind_step(
          rng, policy, reference, win, beta, eta, SETTINGS['c_comparisons'][i],
          features, risk,
      )  # fmt: skip
    error[i, run] = tables.kl(equilibrium, policy).mean()
  return error.tolist()


def compute(seed: int) -> dict[str, Any]:
  """Every number of the figure, by panel."""
  rng = np.random.default_rng(seed)
  reference, reward = instance(rng)
  linear_reference, linear_win, features = linear_instance(rng)
  fits = {'one value per arm': (None, 'squared')}
  for risk in bandit_samples.CURVATURE:
    fits[f'linear, {risk} risk'] = features, risk
  return {
      'a': without_mixing(reference, reward),
      'b': with_mixing(reference, reward),
      'c': {'one value per arm, any risk': sampled(
          seed, reference, tables.win_matrix(reward)
      )},
      'd': {
          name: sampled(seed, linear_reference, linear_win, *fit)
          for name, fit in fits.items()
      },
  }  # fmt: skip


def headlines(panels: dict[str, Any]) -> dict[str, Any]:
  """What the figure says, in a few numbers."""
  said = {}
  for name, way in panels['a'].items():
    near = np.flatnonzero(np.array(way) < 1e-6)
    if len(near):
      said[f'a: steps to 1e-6, {name}'] = int(near[0])
    else:
      said[f'a: distance in the end, {name}'] = way[-1]
  apart = panels['b']['WIND to iterative BoN']
  for beta in (2.0, 0.5, 0.1, 0.02):
    at = int(np.abs(np.log(np.array(SETTINGS['b_betas']) / beta)).argmin())
    said[f'b: distance at β = {SETTINGS["b_betas"][at]:.2g}'] = apart[at]
  log_m = np.log(SETTINGS['c_comparisons'])
  for panel in 'cd':
    for name, error in panels[panel].items():
      slope = np.polyfit(log_m[1:], np.log(np.mean(error, -1))[1:], 1)[0]
      said[f'{panel}: power of M, {name}'] = float(slope)
  return said


# -- drawing ------------------------------------------------------------------


def draw(panels: dict[str, Any], seed: int, path: str) -> None:
  """Draws the four panels into a PNG."""
  s = SETTINGS
  titles = {'axes.titlesize': 10, 'axes.titlelocation': 'left'}
  with mpl.rc_context({**plotting.style(plotting.LIGHT), **titles}):
    figure = Figure(figsize=(9.2, 7.2), layout='constrained')
    a, b, c, d = figure.subplots(2, 2).ravel()
    _ways(a, panels['a'])
    _limits(b, panels['b'])
    _errors(c, panels['c'])
    _errors(d, panels['d'])
    a.set_title('a   no mixing: both reach the common limit')
    b.set_title('b   mixing: the two limits meet as β falls')
    c.set_title('c   sampled WIND, a table')
    d.set_title('d   sampled WIND, a win rate linear in features')
    figure.supxlabel(
      f'{_NOTE}; seed {seed}.\n'
      f'a, b, c: {s["prompts"]} prompts x {s["arms"]} arms, reward N(0, 1),'
      f' reference softmax of N(0, {s["reference_logits_sd"]}²).   c, d:'
      f' β = {s["c_beta"]}, η = {s["c_eta"]:g}, {s["c_steps"]} steps, mean and'
      f' range of {s["c_runs"]} runs.\n'
      f"d: {s['d_prompts']} prompts x {s['d_arms']} arms, P(y beats y') ="
      f' {s["d_preference"]}; features: {s["d_features"]} per arm and one per'
      ' prompt.',
      fontsize=7.5,
    )
    figure.savefig(path, dpi=160, metadata={'Software': None})


def _positive(values: Sequence[float]) -> np.ndarray:
  """What a log axis can show: below rounding there is nothing to see."""
  values = np.array(values)
  return np.where(values > 1e-15, values, np.nan)


# Blue is iterative Best-of-N and orange WIND as it stands, in every panel.
_BLUE, _ORANGE, _GREEN, _PURPLE, _OLIVE = plotting.LIGHT['colours']


def _ways(ax, ways):
  looks = (_BLUE, 'o-'), (_BLUE, 's--'), (_ORANGE, '-'), (_ORANGE, '--')
  for (name, way), (colour, look) in zip(
    ways.items(), (*looks, (_GREEN, '-')), strict=True
  ):
    ax.plot(_positive(way), look, color=colour, ms=3.5, lw=1.3, label=name)
  ax.set(yscale='log', xlabel='step', ylim=(1e-15, 3))
  ax.set_ylabel('total variation to the limit')
  ax.legend(loc='center right')


def _limits(ax, apart):
  betas = SETTINGS['b_betas']
  looks = (_PURPLE, '-', 2.6), (_ORANGE, '--', 1.3), (_BLUE, ':', 1.8)
  for (name, values), (colour, line, width) in zip(
    apart.items(), looks, strict=True
  ):
    ax.plot(betas, _positive(values), line, color=colour, lw=width, label=name)
  ax.set(xscale='log', yscale='log', ylim=(1e-15, 3), xlabel='β, falling')
  ax.set_ylabel('total variation')
  ax.invert_xaxis()
  ax.legend(loc='lower left')


def _errors(ax, errors):
  m = np.array(SETTINGS['c_comparisons'])
  looks = (_ORANGE, 'o-'), (_GREEN, 's-'), (_PURPLE, 'D-'), (_OLIVE, '^-')
  for (name, error), (colour, look) in zip(errors.items(), looks, strict=False):
    mean = np.mean(error, -1)
    ax.plot(m, mean, look, color=colour, ms=4, lw=1.3, label=name)
    low, high = np.min(error, -1), np.max(error, -1)
    ax.fill_between(m, low, high, color=colour, alpha=0.12, lw=0)
  guide = mean[-1] * m[-1] / m
  ax.plot(m, guide, color=plotting.LIGHT['ink'], lw=0.9, ls=':', label='1 / M')
  ax.set(xscale='log', yscale='log', xlabel='comparisons per step, M')
  ax.set_ylabel('KL(equilibrium || policy), nats')
  ax.legend(loc='lower left')


# -- the command --------------------------------------------------------------


def main(out: str, seed: int) -> None:
  start = time.perf_counter()
  print('bandit: exact tables, then sampled WIND; about 20 seconds', flush=True)
  try:
    os.makedirs(out, exist_ok=True)
    why = None if os.access(out, os.W_OK) else 'no permission'
  except OSError as e:
    why = e.strerror
  if why:
    raise UserError(f'cannot write to --out={out}: {why}; give another folder.')
  panels = compute(seed)
  draw(panels, seed, os.path.join(out, 'bandit_figure1.png'))
  asked = {'seed': seed, 'settings': SETTINGS, 'note': _NOTE}
  write_json(os.path.join(out, 'bandit_figure1.json'), {**asked, **panels})
  said = headlines(panels)
  packages = 'numpy', 'matplotlib'
  versions = {p: importlib.metadata.version(p) for p in packages}
  path = os.path.join(out, 'summary.json')
  seconds = round(time.perf_counter() - start, 3)
  write_json(
    path, {'asked': asked, **said, 'versions': versions, 'seconds': seconds}
  )
  rows = [('', 'value'), *said.items(), ('seconds', seconds)]
  show.table(rows, f'bandit: done, see {path} ({_NOTE})')


def _run() -> None:
  out = paths.flag('out', None, 'The folder to write.', required=True)
  seed = flags.DEFINE_integer('seed', 0, 'Of instances and samples.', 0)
  execute(lambda: main(out.value, seed.value), __doc__)


if __name__ == '__main__':
  _run()
