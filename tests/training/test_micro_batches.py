"""Micro-batches are a partition of the batch, padded to what they hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.training import micro_batches
from bond_jax.types import Prompts, Rollout

B, P, K, T = 12, 6, 2, 9


@pytest.fixture
def batch():
  """Rewards name the rows; lengths are drawn."""
  rng = np.random.default_rng(0)
  lengths = rng.integers(1, P + 1, B)
  mask = np.arange(P)[None] >= P - lengths[:, None]
  done = np.arange(T)[None, None] < rng.integers(1, T + 1, (B, K, 1))
  prompts = Prompts(mask.astype(np.int32), mask, np.arange(B), np.ones(B))
  drawn = Rollout(
    done.astype(np.int32), done, -done.astype(float), np.ones((B, K))
  )
  return prompts, drawn, np.arange(B)[:, None] * np.ones((1, K))


def test_join_is_the_inverse_of_split():
  x = np.arange(24).reshape(12, 2)
  parts = micro_batches.split(x, 3)
  assert parts.shape == (3, 4, 2)
  # Each takes its share of every part of the mesh, here of two.
  np.testing.assert_array_equal(parts[1, :, 0] // 12, [0, 0, 1, 1])
  np.testing.assert_array_equal(micro_batches.join(jnp.asarray(parts)), x)


@pytest.mark.parametrize('parts', [1, 2])
@pytest.mark.parametrize('n', [2, 3])
def test_rows_of_like_lengths_come_together(batch, n, parts):
  prompts, drawn, judged = micro_batches.by_length(n, parts, *batch)
  row = np.asarray(judged[:, 0], int)
  # A permutation within each part, the same for all that belongs to a row.
  for share in np.split(row, parts):
    assert set(share // (B // parts)) == {share[0] // (B // parts)}
  assert sorted(row) == list(range(B))
  jax.tree.map(
    lambda x, y: np.testing.assert_array_equal(x, y[row]),
    (prompts, drawn),
    batch[:2],
  )
  share = lambda mask: np.asarray(mask).sum(-1) / mask.shape[-1]
  length = np.maximum(share(prompts.mask), share(drawn.mask).max(-1))
  for of_part in np.split(length, parts):
    order = np.asarray(micro_batches.split(of_part, n)).reshape(-1)
    np.testing.assert_array_equal(order, np.sort(order))


def folded(buckets, lengths):
  """The sizes at which micro-batches of lengths (p, t) were seen, in turn."""
  p, t = np.array(lengths).T
  mask = np.arange(P) >= P - np.stack([np.ones_like(p), p], 1)[..., None]
  done = np.arange(T) < np.stack([t, np.ones_like(t)], 1)[..., None, None]

  def f(carry, part, size):
    return carry + part, (part, jnp.array(size))

  fold = jax.jit(lambda *x: micro_batches.fold(buckets, f, 0, *x))
  total, (parts, sizes) = fold(np.arange(len(p)), mask, done)
  assert total == len(p) * (len(p) - 1) // 2
  np.testing.assert_array_equal(parts, np.arange(len(p)))
  return [tuple(size) for size in sizes.tolist()]


@pytest.mark.parametrize(
  'p, t, size', [(1, 1, (2, 3)), (2, 3, (2, 3)), (3, 1, (4, 6)), (1, 4, (4, 6)),
                 (5, 1, (6, 9)), (1, 7, (6, 9)), (6, 9, (6, 9))],
)  # fmt: skip
def test_the_least_size_that_holds_the_batch(p, t, size):
  assert folded(3, [(p, t)]) == [size]


def test_every_micro_batch_is_folded_once_and_in_turn():
  assert folded(1, [(1, 1), (6, 9)]) == [(6, 9), (6, 9)]
  assert folded(3, [(1, 1), (2, 2), (3, 3), (6, 1)]) == [
    (2, 3), (2, 3), (4, 6), (6, 9)
  ]  # fmt: skip
  assert folded(3, [(6, 9)] * 3) == [(6, 9)] * 3
  # One that comes after a longer one is padded as that was.
  assert folded(3, [(1, 1), (5, 1), (1, 1)]) == [(2, 3), (6, 9), (6, 9)]


def test_trimming_cuts_padding_alone(batch):
  prompts, drawn, _ = batch
  some, completion, mask = micro_batches.trim(
    (4, 5), prompts, drawn.completion, drawn.mask
  )
  np.testing.assert_array_equal(some.tokens, prompts.tokens[:, 2:])
  np.testing.assert_array_equal(some.mask, prompts.mask[:, 2:])
  np.testing.assert_array_equal(completion, drawn.completion[..., :5])
  np.testing.assert_array_equal(mask, drawn.mask[..., :5])
