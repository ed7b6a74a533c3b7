"""Eight virtual devices, strict broadcasting, and the tiny models of tests."""

import base64
import os

import jax

jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_threefry_partitionable', True)
# The suite's time goes into compiling tiny programs: a third less so.
jax.config.update('jax_disable_most_optimizations', True)
# One cache of programs for all workers, commands and runs of the suite.
_ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
jax.config.update(
  'jax_compilation_cache_dir',
  os.environ.get('JAX_COMPILATION_CACHE_DIR')
  or os.path.join(_ROOT, '.pytest_cache', 'jax'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)

import functools  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402

from bond_jax.models.gemma import model as gemma  # noqa: E402

# Every branch of the model, at sizes that compile in a second.
TINY = {
    # Two patterns of three layers do not fit into five: a remainder of two.
    'gemma3': gemma.Config(
        vocab_size=11, features=16, layers=5, heads=4, kv_heads=2,
        head_size=8, feed_forward=24, pattern=('local', 'local', 'global'),
        window=3, qk_norm=True, post_norms=True, global_rope_base=1e6,
        global_rope_scale=8.0, gating_transposed=True,
    ),
    'gemma2': gemma.Config(
        vocab_size=22, features=16, layers=2, heads=4, kv_heads=2,
        head_size=4, feed_forward=24, pattern=('local', 'global'), window=3,
        post_norms=True, query_scale=0.4, attention_softcap=1.5,
        final_softcap=4.0, gating_transposed=True, used_vocab=17,
    ),
    'gemma1_multi_query': gemma.Config(
        vocab_size=13, features=16, layers=2, heads=4, kv_heads=1,
        head_size=4, feed_forward=24,
    ),
    'gemma1_multi_head': gemma.Config(
        vocab_size=13, features=16, layers=2, heads=2, kv_heads=2,
        head_size=8, feed_forward=24,
    ),
}  # fmt: skip


def core(count: int, cases) -> list:
  """Cases of a test: the first `count`, and others for `make test-long`."""
  return [
    pytest.param(
      *(case if isinstance(case, tuple) else (case,)),
      marks=() if i < count else pytest.mark.long,
    )
    for i, case in enumerate(cases)
  ]


def random_params(config: gemma.Config, seed: int):
  """Parameters of which none is zero, norms included, float32."""
  shapes = jax.eval_shape(lambda: gemma.init(config, jax.random.key(0)))
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )


@pytest.fixture(scope='session')
def tiny():
  """name -> (config, parameters), of TINY."""

  @functools.cache
  def model(name):
    return TINY[name], random_params(TINY[name], len(name))

  return model


@pytest.fixture
def x64():
  """Double precision within one test; the rest of the suite is float32."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope='session', autouse=True)
def _workers_share_one_toy_run(tmp_path_factory):
  if 'PYTEST_XDIST_WORKER' in os.environ:
    import toy

    toy.shared = str(tmp_path_factory.getbasetemp().parent / 'toy')


# Suites that look at figures; in others a run's are drawn, but not as pixels.
_FIGURES = 'report', 'sweep', 'benchmarks', 'notebooks'
_PIXEL = base64.b64decode(
  'iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8A'
  'AAAASUVORK5CYII='
)


@pytest.fixture(autouse=True)
def _figures_cost_nothing(request, monkeypatch):
  if not any(word in request.node.nodeid for word in _FIGURES):
    monkeypatch.setattr(
      'matplotlib.figure.Figure.savefig',
      lambda self, file, **_: file.write(_PIXEL),
    )
