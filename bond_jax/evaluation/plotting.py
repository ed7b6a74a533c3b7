"""Colours and Matplotlib settings of all figures, for light and dark paper."""

from collections.abc import Mapping
from typing import Any

import numpy as np

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


def style(look: Mapping[str, Any]) -> dict[str, Any]:
  """Matplotlib's settings for LIGHT or DARK."""
  ink, faint, paper = look['ink'], look['faint'], look['paper']
  return {
    'font.size': 9,
    'text.color': ink,
    'axes.labelcolor': ink,
    'axes.edgecolor': faint,
    'axes.facecolor': paper,
    'figure.facecolor': paper,
    'xtick.color': ink,
    'ytick.color': ink,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': faint,
    'grid.alpha': 0.5,
    'grid.linewidth': 0.5,
    'legend.frameon': False,
    'legend.fontsize': 8,
  }


def error_bars(mean, low, high) -> np.ndarray:
  """Lengths [2, ...]; rounding may put a mean just outside its interval."""
  return np.maximum([mean - low, high - mean], 0)
