"""The figures of a report, each drawn for light and for dark paper."""

from collections.abc import Callable, Mapping, Sequence
import io
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
import numpy as np

from bond_jax.evaluation import plotting
from bond_jax.evaluation.report.words import best_of, opponent, why_missing
from bond_jax.measures import curves

Rows = Sequence[Mapping[str, Any]]


class Drawing(NamedTuple):
  """One finished figure."""

  name: str
  caption: str
  light: bytes  # PNG
  dark: bytes


class Data(NamedTuple):
  """The numbers of a run that figures show."""

  train: Rows
  sft: Rows
  summary: Mapping[str, Any]
  curve: curves.Curve | None


# Draws onto axes in the colours of a look; False if the run has no such data.
Draw = Callable[[Axes, Data, Mapping[str, Any]], bool]


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the rows that have a number under `key`."""
  points = [(r['step'], r[key]) for r in rows if r.get(key) is not None]
  steps, values = np.array(points, np.float64).reshape(-1, 2).T
  return steps, values


def smooth(x: np.ndarray) -> np.ndarray:
  """Running median over about a twelfth of the run.

  The window shrinks towards both ends, evenly, so that a trend keeps its ends.
  """
  width = lambda i: min(len(x) // 24, i, len(x) - 1 - i)
  halves = map(width, range(len(x)))
  windows = (x[i - h : i + h + 1] for i, h in enumerate(halves))
  return np.array([*map(np.median, windows)])


def by_step(
  ylabel: str,
  keys: Mapping[str, str],
  *,
  rows: str = 'train',
  line: float | None = None,
  **axes: Any,
) -> Draw:
  """A figure of metrics against step: noisy ones faint, with a running median.

  `keys` of the rows have a label each, `rows` is 'train' or 'sft', `line` the
  height of a dotted line, and `axes` further settings of the axes.
  """

  def draw(ax: Axes, data: Data, look) -> bool:
    drawn = False
    for (key, label), colour in zip(keys.items(), look['colours']):
      steps, values = series(getattr(data, rows), key)
      if len(steps) > 40:
        ax.plot(steps, values, color=colour, alpha=0.25, lw=0.8)
        ax.plot(steps, smooth(values), color=colour, label=label)
      elif len(steps):
        ax.plot(steps, values, 'o-', color=colour, ms=3.5, label=label)
      drawn |= len(steps) > 0
    if line is not None:
      ax.axhline(line, color=look['ink'], lw=1, ls=':')
    ax.set(xlabel='step', ylabel=ylabel, **axes)
    if len(keys) > 1 and drawn:
      # Above the axes, where no line can run through it.
      ax.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=4, borderpad=0,
                handlelength=1, columnspacing=1, handletextpad=0.5)  # fmt: skip
    return drawn

  return draw


def frontier(ax: Axes, data: Data, look) -> bool:
  """Win rate against KL: this run, and Best-of-N of the reference."""
  if data.curve is None:
    return False
  blue, orange, green, purple, _ = look['colours']
  other = opponent(data.summary)
  # The rows of training are against the reference.
  rows = data.train if other == 'the reference' else []
  _, kl = series(rows, 'kl/reference')
  _, rate = series(rows, 'win_rate/reference')
  final, pay = data.summary.get('win_rate'), data.summary.get('kl')
  times = data.summary.get('extrapolated') or {}
  won, far = (
    np.array([row[key] for row in times.values()]) for key in ('win_rate', 'kl')
  )
  edge = 1.08 * max(*kl, *far, pay or 0.0, data.curve.kl[-1])
  tilt_rate, tilt_kl = curves.tilt_frontier(np.geomspace(1e-2, 1e4, 400))
  free_rate, free_kl = curves.closed_form(np.geomspace(1, 1e4, 400))
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
    bars = plotting.error_bars(final, *data.summary['win_rate_interval'])
    ax.errorbar(
      pay, final, xerr=1.96 * data.summary['kl_stderr'], yerr=bars[:, None],
      fmt='D', color=blue, ms=5, elinewidth=1, label='this run, at the end',
    )  # fmt: skip
  if len(times):
    order = np.argsort(far)
    ax.plot(far[order], won[order], 's--', color=blue, ms=3, lw=0.8,
            mfc=look['paper'], label='this run, extrapolated')  # fmt: skip
  ax.set(xlim=(-0.02 * edge, edge), ylim=(min(0.48, *rate, 1), 1.005),
         xlabel=f'KL to {_short(other)}, nats', ylabel='win rate')  # fmt: skip
  ax.legend(loc='best')
  return True


def _short(name: str) -> str:
  """A name that fits below an axis; its end says most."""
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
  ax.set(xlim=(0, 1), ylim=(0, None), ylabel='density',
         xlabel=f'quantile of the reward under {other}')  # fmt: skip
  ax.legend(loc='best')
  return True


def best_of_n(ax: Axes, data: Data, look) -> bool:
  """One sample of the policy against the best of N."""
  found = best_of(data.summary)
  if not found:
    return False
  ns, rates, intervals = zip(*found, strict=True)
  x, y = np.arange(len(ns)), np.array(rates)
  bars = plotting.error_bars(y, *np.array(intervals).T)
  ax.axhline(0.5, color=look['ink'], lw=1, ls=':')
  ax.annotate('as good', (1, 0.5), (-2, 3), textcoords='offset points',
              xycoords=('axes fraction', 'data'), ha='right')  # fmt: skip
  ax.errorbar(x, y, yerr=bars, fmt='o', ms=4, capsize=4,
              color=look['colours'][0])  # fmt: skip
  for at, rate in zip(x, y, strict=True):
    ax.annotate(
      f'{rate:.2f}', (at, rate), (7, -3), textcoords='offset points',
      bbox=dict(boxstyle='square,pad=0.1', fc=look['paper'], ec='none'),
    )  # fmt: skip
  ax.set_xticks(x, [f'{n}' for n in ns])
  other = _short(opponent(data.summary))
  ax.set(xlim=(-0.4, len(ns) - 0.2), ylim=(0, 1), ylabel='win rate',
         xlabel=f'N of Best-of-N of {other}')  # fmt: skip
  return True


_KL = {
  'kl/reference': 'policy to reference',
  'kl/policy_anchor': 'policy to anchor',
}
_PHASES = {
  f'seconds/{x}': x for x in ('sample', 'reward', 'update', 'evaluate')
}
_SFT = {'loss': 'training', 'validation_loss': 'validation'}
# Name -> how it is drawn, and its caption.
FIGURES: dict[str, tuple[Draw, str]] = {
  'frontier': (
    frontier,
    'Win rate against KL to {other}. Higher and further left is better. The'
    ' numbers on the Best-of-N curve are N.',
  ),
  'quantiles': (
    quantiles,
    'Where completions fall among those of {other}: 1 is the best. That of'
    ' {other} itself is flat; Best-of-N leans to the right.',
  ),
  'best_of_n': (
    best_of_n,
    'How often one sample of the policy beats the best of N samples of {other},'
    ' by the reward; ties count one half. At 0.5 it is as good.',
  ),
  'reward': (
    by_step('reward', {'reward/policy': 'policy', 'reward/anchor': 'anchor'}),
    'Mean reward of the completions that training drew.',
  ),
  'kl': (
    by_step('nats per completion', _KL),
    'How far the policy has gone from the fixed reference, and how far it is'
    ' ahead of its moving anchor.',
  ),
  'win_rate': (
    by_step('win rate', {'win_rate/reference': 'win rate'}, line=0.5),
    'In training: how often a held-out completion of the policy beats one of'
    ' the reference; ties count one half. The line is a coin toss.',
  ),
  'anchor_drift': (
    by_step('distance', {'anchor/drift': 'drift'}),
    'How far the anchor has moved from where it began, relative to its size.',
  ),
  'signal': (
    by_step('share of prompts', {'signal/fires': 'fires'}, ylim=(0, 1)),
    'Share of prompts on which the reward gave a signal to learn from.',
  ),
  'length': (
    by_step('tokens', {'length/completion': 'length'}, ylim=(0, None)),
    'Length of the completions that training drew.',
  ),
  'seconds': (
    by_step('seconds per row', _PHASES, yscale='log'),
    'Time per phase of a row, on a log scale; the first one compiles.',
  ),
  'sft_loss': (
    by_step('nats per token', _SFT, rows='sft'),
    'The stage before: learning to write, on training text and on held-out'
    ' text.',
  ),
}
_OF_SUMMARY = {
  'quantiles': 'quantiles',
  'best_of_n': 'win_rate_against_best_of',
}


def _png(draw: Draw, data: Data, look) -> bytes | None:
  with mpl.rc_context(plotting.style(look)):
    # Drawn small, so that its text is large enough on a phone.
    figure = Figure(figsize=(3.6, 2.8), layout='constrained')
    if not draw(figure.add_subplot(), data, look):
      return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=200, metadata={'Software': None})
  return buffer.getvalue()


def draw_all(data: Data) -> tuple[list[Drawing], dict[str, str]]:
  """All figures that the run has data for; why each other one is missing."""
  drawings, missing = [], {}
  other = opponent(data.summary)
  for name, (draw, caption) in FIGURES.items():
    light = _png(draw, data, plotting.LIGHT)
    if light is not None:
      dark = _png(draw, data, plotting.DARK)
      caption = caption.replace('{other}', other)
      drawings.append(Drawing(name, caption, light, dark))
    elif key := _OF_SUMMARY.get(name):
      missing[name] = why_missing(key, data.summary)
    else:
      missing[name] = 'this run has no rows for it'
  return drawings, missing
