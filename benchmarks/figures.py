"""The same results, drawn."""

import os

import matplotlib

from benchmarks import peers, tables

matplotlib.use('Agg')
import matplotlib.pyplot as plt


def draw(found: dict, out: str) -> None:
  """sampling.png: tokens per second, and ours against each peer."""
  if 'sampling' not in found:
    return
  rows = found['sampling']
  fig, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2))
  width, colours = 0.8 / len(peers.NAMES), plt.get_cmap('tab10').colors
  for i, (name, label) in enumerate(peers.NAMES.items()):
    places = [x + (i - 1.5) * width for x in range(len(rows))]
    rate = [tables.rates(row)[name] or 0 for row in rows.values()]
    left.bar(places, rate, width, label=label, color=colours[i])
    ratio = [tables.ratios(row).get(name, 0) for row in rows.values()]
    if name != 'ours':
      right.bar(places, ratio, width, label=label, color=colours[i])
  left.set(title='tokens per second')
  left.yaxis.set_major_formatter('{x:,.0f}')
  right.axhline(1, color='black', linewidth=0.8)
  right.set(title='bond_jax / the other')
  for axis in (left, right):
    axis.set_xticks(range(len(rows)), list(rows), rotation=30, ha='right')
    axis.spines[['top', 'right']].set_visible(False)
  fig.legend(*left.get_legend_handles_labels(), loc='upper center', ncols=4,
             frameon=False)  # fmt: skip
  fig.tight_layout(rect=(0, 0, 1, 0.93))
  fig.savefig(os.path.join(out, 'sampling.png'), dpi=120)
  plt.close(fig)
