"""Ties, baselines and masked sums against loops."""

import jax
import jax.numpy as jnp
import numpy as np

from bond_jax.algorithms.parts import ops


def test_win_matrix_counts_a_tie_as_half():
  win = jax.jit(ops.win_matrix)(jnp.array([[3.0, 1.0, 3.0]]))
  np.testing.assert_array_equal(
    win, [[[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]]
  )
  assert win.dtype == jnp.float32


def test_win_and_its_transpose_sum_to_one():
  reward = np.random.default_rng(0).integers(0, 4, (5, 6)).astype(np.float32)
  win = np.asarray(jax.jit(ops.win_matrix)(reward))
  np.testing.assert_array_equal(win + win.swapaxes(-1, -2), 1)


def leave_one_out(x, w):
  out = np.zeros_like(x)
  for i in range(len(x)):
    others = [j for j in range(len(x)) if j != i and w[j] > 0]
    if others:
      out[i] = sum(w[j] * x[j] for j in others) / sum(w[j] for j in others)
  return out


def test_borda_is_how_often_each_beats_the_others():
  win = np.full((2, 3, 3), 0.5, np.float32)
  win[0] += np.array([[0, 0.5, 0.25], [-0.5, 0, 0.5], [-0.25, -0.5, 0]])
  expected = [[(1 + 0.75) / 2, (0 + 1) / 2, (0.25 + 0) / 2], [0.5] * 3]
  np.testing.assert_array_equal(ops.borda(jnp.asarray(win)), expected)
  # Of a reward: the order, ties included.
  reward = jnp.array([3.0, -1.0, 3.0, 7.0])
  borda = ops.borda(ops.win_matrix(reward))
  np.testing.assert_allclose(borda, np.array([1.5, 0, 1.5, 3]) / 3, rtol=1e-6)
  assert ops.borda(jnp.full((1, 1), 0.5)) == 0.5


def test_leave_one_out_mean_is_the_weighted_mean_of_the_others():
  rng = np.random.default_rng(0)
  x = rng.standard_normal((5, 3)).astype(np.float32)
  w = np.array([1, 1, 0.5, 0, 2], np.float32)
  out = jax.jit(ops.leave_one_out_mean)(x, w)
  np.testing.assert_allclose(out, leave_one_out(x, w), atol=1e-6)


def test_leave_one_out_mean_without_others_is_zero():
  f = jax.jit(ops.leave_one_out_mean)
  np.testing.assert_array_equal(f(np.ones((1, 2)), np.ones(1)), 0)
  x, w = np.array([[3.0], [5.0]]), np.array([1.0, 0.0])
  # The filler row does have another: the only real one.
  np.testing.assert_array_equal(f(x, w), [[0], [3]])


def test_no_mean_sees_what_a_filler_row_holds():
  x = np.array([[1.0, 2], [3, 4], [np.nan, np.inf]], np.float32)
  w = np.array([1.0, 1, 0], np.float32)
  loo, mean = jax.jit(
    lambda x, w: (ops.leave_one_out_mean(x, w), ops.weighted_mean(x, w))
  )(x, w)
  np.testing.assert_array_equal(loo, [[3, 4], [1, 2], [2, 3]])
  np.testing.assert_array_equal(mean, [2, 3])


def test_weighted_mean():
  x, w = np.array([[1.0, 0], [4, 2]]), np.array([1.0, 3])
  np.testing.assert_allclose(jax.jit(ops.weighted_mean)(x, w), [3.25, 1.5])


def test_sum_to_go_holds_this_position_and_all_later_ones():
  x = np.array([[1.0, 10, 100], [2, 0, -5]])
  np.testing.assert_array_equal(
    jax.jit(ops.sum_to_go)(x), [[111, 110, 100], [-3, -5, -5]]
  )


def test_take_rows():
  x = np.arange(2 * 3 * 4).reshape(2, 3, 4)
  index = np.array([[0, 2], [1, 1]])
  flat, deep = jax.jit(
    lambda x, i: (ops.take_rows(x[..., 0], i), ops.take_rows(x, i))
  )(x, index)
  expected = np.stack([x[0, [0, 2]], x[1, [1, 1]]])
  np.testing.assert_array_equal(deep, expected)
  np.testing.assert_array_equal(flat, expected[..., 0])


def test_keep_rows_blanks_the_others_in_every_dtype():
  tree = {
    'f': np.array([[np.nan, 1], [2, 3]], np.float32),
    'i': np.array([4, 5]),
    'b': np.array([True, True]),
  }
  out = jax.jit(ops.keep_rows)(tree, np.array([False, True]))
  np.testing.assert_array_equal(out['f'], [[0, 0], [2, 3]])
  np.testing.assert_array_equal(out['i'], [0, 5])
  np.testing.assert_array_equal(out['b'], [False, True])
  assert out['b'].dtype == bool
