"""Rows and tokens of a step of an algorithm, in closed form.

Everything is per prompt and update, at most: no completion ends before T.
Operations and bytes are in sizing/operations.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from bond_jax.models.log_probs import tokens_read
from bond_jax.types import Algorithm


class Cost(NamedTuple):
  """Rows and tokens of one prompt in one update."""

  decodes: float  # completions drawn
  anchor_rows: float  # forward passes
  reference_rows: float
  quantile_rows: float  # of the learned quantile, each also trained
  trained_rows: float
  prefilled: float  # tokens of prompts that a sampler reads
  decoded: float  # ... drawn
  scored: float  # ... of scored rows, prompts included
  trained: float  # ... of trained rows, prompts and the quantile's included


def num_trained(algorithm: Algorithm) -> int:
  """M: how many of the K completions of a prompt enter the loss."""
  k = algorithm.num_policy + algorithm.num_anchor
  reward = jax.ShapeDtypeStruct((1, k), jnp.float32)
  win = jax.ShapeDtypeStruct((1, k, k), jnp.float32)
  return jax.eval_shape(algorithm.select, reward, win).shape[1]


def cost(
  algorithm: Algorithm, *, prompt: int, length: int, epochs: int
) -> Cost:
  """The cost of one prompt in one update, with P = `prompt`, T = `length`.

  The `epochs`, updates on every rollout, share what it cost.
  """
  a, m = algorithm, num_trained(algorithm)
  drawn = a.num_policy + a.num_anchor
  models = bool(a.num_policy) + bool(a.num_anchor)
  scored = len(a.anchor_rows) + len(a.reference_rows)
  quantile = len(a.quantile_rows)
  row, whole = tokens_read(prompt, length), prompt + length
  return Cost(
    decodes=drawn / epochs,
    anchor_rows=len(a.anchor_rows) / epochs,
    reference_rows=len(a.reference_rows) / epochs,
    quantile_rows=quantile / epochs,
    trained_rows=m,
    prefilled=models * prompt / epochs,
    decoded=drawn * length / epochs,
    scored=(scored * row + quantile * whole) / epochs,
    trained=m * row + quantile * whole,
  )


def of_config(config: ml_collections.ConfigDict, algorithm: Algorithm) -> Cost:
  """The cost of a run; prompts of an enumerable language are one token."""
  found = cost(
    algorithm,
    prompt=config.prompt.length if 'prompt' in config else 1,
    length=config.length,
    epochs=config.train.epochs,
  )
  if config.task == 'text' and config.data.stored:
    return found._replace(decodes=0.0, prefilled=0.0, decoded=0.0)
  return found


def line(found: Cost) -> str:
  """What a user should know before a run, in a few words."""
  return (
    f'per prompt and update, at most: {found.decodes:g} decodes,'
    f' {found.anchor_rows:g} anchor and {found.reference_rows:g} reference'
    f' rows scored, {found.trained_rows:g} rows trained; tokens:'
    f' {found.prefilled:g} prefilled, {found.decoded:g} decoded,'
    f' {found.scored:g} scored, {found.trained:g} trained'
  )
