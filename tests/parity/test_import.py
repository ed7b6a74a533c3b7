"""The oracle itself: the gemma library imports, beside this project's JAX."""

from gemma import gm
import jax
import jax.numpy as jnp


def test_library_knows_the_sizes_of_gemma_3():
  model = gm.nn.Gemma3_270M()
  tokens = jnp.zeros((1, 1), jnp.int32)
  tree = jax.eval_shape(model.init, jax.random.key(0), tokens)
  size = sum(x.size for x in jax.tree.leaves(tree['params']))
  assert 0.26e9 < size < 0.28e9
