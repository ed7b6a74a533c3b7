"""What a reward model is fitted by: a preference, or a number.

Pure functions of scores; N comparisons, or N texts. Each returns one loss per
row, f32[N]; the caller averages.
"""

import jax

from bond_jax.types import Array


def bradley_terry(chosen: Array, rejected: Array) -> Array:
  """-log sigmoid(r_c - r_r), in nats (Bradley & Terry, 1952).

  Args:
    chosen: f32[N], scores r_c of the texts that were preferred.
    rejected: f32[N], scores r_r of the others.
  """
  # softplus(x) = log(1 + e^x) neither overflows nor loses small losses.
  return jax.nn.softplus(rejected - chosen)


def bradley_terry_margin(
  chosen: Array, rejected: Array, margin: Array
) -> Array:
  """-log sigmoid(r_c - r_r - m), in nats (Touvron et al., 2023, eq. 2).

  Args:
    chosen, rejected: as in `bradley_terry`.
    margin: f32[N], m: by how much the preferred text has to lead.
  """
  return bradley_terry(chosen - margin, rejected)


def squared_error(score: Array, rating: Array) -> Array:
  """(r - z)^2 of scores f32[N] and standardised ratings z f32[N]."""
  return (score - rating) ** 2
