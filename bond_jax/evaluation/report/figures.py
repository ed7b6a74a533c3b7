"""The figures of a report: each function draws one onto matplotlib axes.

A figure is drawn twice, in colours for light and for dark paper; `draw_all`
leaves out those of which the run has no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import io
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from bond_jax.evaluation.report.words import best_of, opponent, why_missing
from bond_jax.measures import curves

Rows = Sequence[Mapping[str, Any]]

LIGHT = {
  'paper': '#ffffff',
  'ink': '#22262b',
  'faint': '#c9cdd3',
  'colours': ('#2867b2', '#b9501a', '#2f8558', '#8a4fae', '#7a6a1e'),
}
DARK = {
  'paper': '#1d2126',
  'ink': '#dfe3e8',
  'faint': '#4a5159',
  'colours': ('#78b0f0', '#f0a066', '#72cc9a', '#c99ae8', '#d8c667'),
}


class Drawing(NamedTuple):
  """One finished figure."""

  name: str
  caption: str
  light: bytes  # PNG
  dark: bytes


class Data(NamedTuple):
  """What figures may draw."""

  train: Rows
  sft: Rows
  summary: Mapping[str, Any]
  curve: curves.Curve | None


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the rows that have a number under `key`."""
  points = [(r['step'], r[key]) for r in rows if r.get(key) is not None]
  steps, values = np.array(points, np.float64).reshape(-1, 2).T
  return steps, values


def smooth(x: np.ndarray) -> np.ndarray:
  """Running median over about a twelfth of the run.

  The window shrinks towards both ends, evenly, so that a trend keeps its ends.
  """
  half = len(x) // 24
  y = np.empty(len(x))
  for i in range(len(x)):
    h = min(half, i, len(x) - 1 - i)
    y[i] = np.median(x[i - h : i + h + 1])
  return y


def _lines(ax: Axes, rows: Rows, keys: Mapping[str, str], look) -> bool:
  """Draws keys against step: noisy ones faint, with their running median."""
  drawn = 0
  for (key, label), colour in zip(keys.items(), look['colours'], strict=False):
    steps, values = series(rows, key)
    if not len(steps):
      continue
    drawn += 1
    if len(steps) > 40:
      ax.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
      ax.plot(steps, smooth(values), color=colour, label=label)
    else:
      ax.plot(steps, values, 'o-', color=colour, ms=3.5, label=label)
  ax.set_xlabel('step')
  if len(keys) > 1 and drawn:
    # Above the axes, where no line can run through it.
    ax.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=4, borderpad=0,
              handlelength=1, columnspacing=1, handletextpad=0.5)  # fmt: skip
  return drawn > 0


def frontier(ax: Axes, data: Data, look) -> bool:
  """Win rate against KL: this run, and what the reference's best-of-N pays."""
  if data.curve is None:
    return False
  blue, orange, green, purple, _ = look['colours']
  other = opponent(data.summary)
  # What training has logged was against the reference.
  rows = data.train if other == 'the reference' else []
  _, kl = series(rows, 'kl/reference')
  _, rate = series(rows, 'win_rate/reference')
  final, pay = data.summary.get('win_rate'), data.summary.get('kl')
  ends = [*kl, pay or 0.0, data.curve.kl[-1]]
  edge = 1.08 * max(ends)
  ns = np.geomspace(1, 1e4, 400)
  tilt_rate, tilt_kl = curves.tilt_frontier(np.geomspace(1e-2, 1e4, 400))
  free_rate, free_kl = curves.closed_form(ns)
  ax.plot(tilt_kl, tilt_rate, ':', color=purple, label='optimum, no ties')
  ax.plot(free_kl, free_rate, '--', color=green, label='Best-of-N, no ties')
  ax.plot(data.curve.kl, data.curve.win_rate, color=orange,
          label='Best-of-N, this task')  # fmt: skip
  for n in (2, 4, 8, 16, 32, 64):
    if n <= data.curve.ns[-1]:
      at = [np.interp(n, data.curve.ns, y) for y in data.curve[1:3]]
      ax.plot(at[1], at[0], 'o', ms=2.5, color=orange)
      ax.annotate(f'{n}', (at[1], at[0]), (0, 4), textcoords='offset points',
                  ha='right', fontsize=8, color=orange)  # fmt: skip
  if len(kl):
    ax.plot(kl, rate, 'o-', color=blue, ms=3, lw=0.8, alpha=0.7,
            label='this run, by step')  # fmt: skip
  if final is not None and pay is not None:
    low, high = data.summary['win_rate_interval']
    ax.errorbar(
      pay, final, xerr=1.96 * data.summary['kl_stderr'],
      yerr=_error(final, low, high)[:, None], fmt='D', color=blue, ms=5,
      elinewidth=1, label='this run, at the end',
    )  # fmt: skip
  ax.set(xlim=(-0.02 * edge, edge), ylim=(min(0.48, *rate, 1), 1.005))
  ax.set(xlabel=f'KL to {_short(other)}, nats')
  ax.set(ylabel='win rate')
  ax.legend(loc='best')
  return True


def _error(rate, low, high) -> np.ndarray:
  """Lengths of error bars; rounding may put a mean outside its interval."""
  return np.maximum([rate - low, high - rate], 0)


def _short(name: str) -> str:
  """A name that fits below an axis; the end of it tells most."""
  return name if len(name) <= 24 else f'the run …{name[-15:]}'


def quantiles(ax: Axes, data: Data, look) -> bool:
  """Where completions fall among the reference's, as densities."""
  found = data.summary.get('quantiles')
  if not found:
    return False
  blue, orange, _, _, _ = look['colours']
  other, edges = _short(opponent(data.summary)), np.array(found['edges'])
  ax.axhline(1, color=look['ink'], lw=1, ls=':', label=other)
  ax.stairs(found['policy'], edges, color=blue, fill=True, alpha=0.25)
  ax.stairs(found['policy'], edges, color=blue, lw=1.4, label='policy')
  if found.get('best_of_n') is not None:
    ax.stairs(found['best_of_n'], edges, color=orange, lw=1.4,
              label=f'Best-of-{found["n"]:.1f}')  # fmt: skip
  ax.set(xlim=(0, 1), ylabel='density')
  ax.set(xlabel=f'quantile of the reward under {other}')
  ax.set_ylim(bottom=0)
  ax.legend(loc='best')
  return True


def best_of_n(ax: Axes, data: Data, look) -> bool:
  """One sample of the policy against the best of N."""
  found = best_of(data.summary)
  if not found:
    return False
  ns, rates, intervals = zip(*found, strict=True)
  x, y = np.arange(len(ns)), np.array(rates)
  low, high = np.array(intervals).T
  ax.axhline(0.5, color=look['ink'], lw=1, ls=':')
  ax.annotate('as good', (1, 0.5), (-2, 3), textcoords='offset points',
              xycoords=('axes fraction', 'data'), ha='right')  # fmt: skip
  ax.errorbar(x, y, yerr=_error(y, low, high), fmt='o', ms=4, capsize=4,
              color=look['colours'][0])  # fmt: skip
  for at, rate in zip(x, y, strict=True):
    ax.annotate(
      f'{rate:.2f}', (at, rate), (7, -3), textcoords='offset points',
      bbox=dict(boxstyle='square,pad=0.1', fc=look['paper'], ec='none'),
    )  # fmt: skip
  ax.set_xticks(x, [f'{n}' for n in ns])
  ax.set(xlim=(-0.4, len(ns) - 0.2), ylim=(0, 1), ylabel='win rate')
  ax.set_xlabel(f'N of Best-of-N of {_short(opponent(data.summary))}')
  return True


def reward(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('reward')
  names = {'reward/policy': 'policy', 'reward/anchor': 'anchor'}
  return _lines(ax, data.train, names, look)


def kl(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('nats per completion')
  names = {
    'kl/reference': 'policy to reference',
    'kl/policy_anchor': 'policy to anchor',
  }
  return _lines(ax, data.train, names, look)


def win_rate(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('win rate')
  ax.axhline(0.5, color=look['ink'], lw=1, ls=':')
  return _lines(ax, data.train, {'win_rate/reference': 'win rate'}, look)


def anchor_drift(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('distance')
  return _lines(ax, data.train, {'anchor/drift': 'drift'}, look)


def signal(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('share of prompts')
  ax.set_ylim(0, 1)
  return _lines(ax, data.train, {'signal/fires': 'fires'}, look)


def length(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('tokens')
  drawn = _lines(ax, data.train, {'length/completion': 'length'}, look)
  ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
  return drawn


def seconds(ax: Axes, data: Data, look) -> bool:
  """Time per phase, on a log scale: the first step compiles."""
  phases = 'sample', 'reward', 'update', 'evaluate'
  names = {f'seconds/{name}': name for name in phases}
  ax.set(ylabel='seconds per row', yscale='log')
  return _lines(ax, data.train, names, look)


def sft_loss(ax: Axes, data: Data, look) -> bool:
  ax.set_ylabel('nats per token')
  names = {'loss': 'training', 'validation_loss': 'validation'}
  return _lines(ax, data.sft, names, look)


CAPTIONS = {
  frontier: """Win rate against KL to {other}. Higher and further left is
    better. The numbers on the Best-of-N curve are N.""",
  quantiles: """Where completions fall among those of {other}: 1 is the best.
    That of {other} itself is flat; Best-of-N leans to the right.""",
  best_of_n: """How often one sample of the policy beats the best of N samples
    of {other}, by the reward; ties count one half. At 0.5 it is as good.""",
  reward: """Mean reward of the completions that training drew.""",
  kl: """How far the policy has gone from the fixed reference, and how far it
    is ahead of its moving anchor.""",
  win_rate: """In training: how often a held-out completion of the policy
    beats one of the reference; ties count one half. The line is a coin
    toss.""",
  anchor_drift: """How far the anchor has moved from where it began, relative
    to its size.""",
  signal: """Share of prompts on which the reward gave a signal to learn
    from.""",
  length: """Length of the completions that training drew.""",
  seconds: """Time per phase of a row, on a log scale; the first
    one compiles.""",
  sft_loss: """The stage before: learning to write, on training text and on
    held-out text.""",
}


def style(look: Mapping[str, Any]) -> dict[str, Any]:
  """Matplotlib's settings for LIGHT or DARK paper."""
  return {
    'font.size': 9,
    'text.color': look['ink'],
    'axes.labelcolor': look['ink'],
    'axes.edgecolor': look['faint'],
    'axes.facecolor': look['paper'],
    'figure.facecolor': look['paper'],
    'xtick.color': look['ink'],
    'ytick.color': look['ink'],
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': look['faint'],
    'grid.alpha': 0.5,
    'grid.linewidth': 0.5,
    'legend.frameon': False,
    'legend.fontsize': 8,
  }


def _png(draw, data: Data, look) -> bytes | None:
  with mpl.rc_context(style(look)):
    # Drawn small, so that its text is large enough on a phone.
    figure = Figure(figsize=(3.6, 2.8), layout='constrained')
    if not draw(figure.add_subplot(), data, look):
      return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=200, metadata={'Software': None})
  return buffer.getvalue()


_OF_SUMMARY = {quantiles: 'quantiles', best_of_n: 'win_rate_against_best_of'}


def draw_all(data: Data) -> tuple[list[Drawing], dict[str, str]]:
  """Draws what there is data for; names the other figures, and says why."""
  drawings, missing = [], {}
  other = opponent(data.summary)
  for draw, caption in CAPTIONS.items():
    light = _png(draw, data, LIGHT)
    if light is None:
      key = _OF_SUMMARY.get(draw)
      missing[draw.__name__] = (
        why_missing(key, data.summary) if key else 'this run has no rows for it'
      )
    else:
      dark = _png(draw, data, DARK)
      caption = ' '.join(caption.split()).replace('{other}', other)
      drawings.append(Drawing(draw.__name__, caption, light, dark))
  return drawings, missing
