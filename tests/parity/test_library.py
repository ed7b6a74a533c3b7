"""Models of the gemma library as policies: sampled and scored as ours are."""

import os

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import dataclasses
import functools

import dialog
from gemma import gm
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_load
from test_logits import CONFIGS, library, nested, random_params
import test_tokenizer
import toy

from bond_jax.data import tokenizer
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import library as adapter
from bond_jax.models import log_probs, policies, sampling
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.types import Prompts
from bond_jax.weights import export, load, official

STRANGERS = 'Gemma3n_E2B', 'Gemma4_E2B', 'Gemma4_26B_A4B'
_WIDTHS = dict(
  num_embed=37, embed_dim=24, hidden_dim=40, num_heads=4, head_dim=8,
  num_kv_heads=2, sliding_window_size=4, vision_encoder=None,
)  # fmt: skip


@functools.cache
def tiny(name):
  """Gemma 3n or 4, everything but the sizes: shared caches, experts."""
  kind = getattr(gm.nn, name)
  config = kind.config
  # Local and global, each once with a cache of its own and once without.
  types = (config.attention_types[0], config.attention_types[-1]) * 2
  sizes = dict(attention_types=types)
  if config.per_layer_input_dim:
    sizes |= dict(per_layer_input_dim=6)
  if name == 'Gemma3n_E2B':
    sizes |= dict(activation_sparsity_pattern=(0.95, 0, 0, 0), laurel_rank=3)
  elif name == 'Gemma4_E2B':
    sizes |= dict(
      global_key_size=16, audio_encoder=None, override_kv_shared_ffw_hidden=48
    )
  else:
    sizes |= dict(
      global_key_size=16, num_global_kv_heads=1, num_experts=4, expert_dim=5,
      top_k_experts=2, moe_dense_hidden_dim=40,
    )  # fmt: skip
  if sharing := config.kv_cache_sharing_config:
    sharing = dataclasses.replace(sharing, frac_shared_layers=0.5)
    sizes |= dict(kv_cache_sharing_config=sharing)
  config = dataclasses.replace(config, **_WIDTHS, **sizes)
  model = kind(config=config, dtype=jnp.float32)
  init = lambda: model.init(jax.random.key(0), np.zeros((1, 2), np.int32))
  shapes = jax.eval_shape(init)['params']
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: (0.3 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )
  return model, params


@pytest.fixture(autouse=True)
def _rank_promotion():
  """The library relies on it, in Gemma 3n and 4."""
  with jax.numpy_rank_promotion('allow'):
    yield


def prompts():
  """Of three lengths, padded on the left; token 0 is one like any other."""
  rng = np.random.default_rng(2)
  mask = np.arange(5)[None] >= np.array([[0], [2], [4]])
  tokens = rng.integers(0, 37, (3, 5)).astype(np.int32)
  tokens[0, 1] = 0
  ones = np.ones((3,), np.float32)
  return Prompts(tokens, mask, np.arange(3, dtype=np.int32), ones)


def draw(policy, params):
  """Two completions of eight tokens each, and their scores in one go."""
  rollout = jax.jit(
    lambda params: sampling.sample(
      policy, params, prompts(), jax.random.key(3),
      sampling.Limits(8, Stop((1,))), num=2,
    )
  )(params)  # fmt: skip
  scores = jax.jit(
    lambda params: log_probs.log_probs(
      policy, params, prompts(), rollout.completion, rollout.mask, chunk=3
    )
  )(params)
  return rollout, scores


@pytest.mark.parametrize('name', ['gemma3', 'gemma2'])
def test_as_our_own_model(name):
  """The same completions, with the same log-probs, sampled and scored."""
  config = dataclasses.replace(CONFIGS[name], used_vocab=30)
  params = random_params(config)
  kwargs = dict(temperature=0.7, dtype='float32')
  mine, scores = draw(
    gemma.make(config, **kwargs, scan=False, remat='none'), params
  )
  policy = adapter.make(library(config), **kwargs, used_vocab=30)
  theirs, their_scores = draw(policy, nested(config, params))
  np.testing.assert_array_equal(theirs.completion, mine.completion)
  np.testing.assert_array_equal(theirs.mask, mine.mask)
  assert mine.mask.sum() > 30 and np.max(mine.completion) < 30
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
  close(theirs.log_prob, mine.log_prob)
  close(their_scores, scores)
  close(their_scores, theirs.log_prob)


@pytest.mark.parametrize('name', STRANGERS)
def test_models_that_ours_does_not_know(name):
  """Cached sampling equals scoring, which equals the library's own logits."""
  model, params = tiny(name)
  policy = adapter.make(model, temperature=1.0, dtype='float32')
  rollout, scores = draw(policy, params)
  np.testing.assert_allclose(scores, rollout.log_prob, rtol=1e-4, atol=1e-4)
  # One row by itself, without padding, through the library alone.
  tokens, mask = prompts().tokens[1], prompts().mask[1]
  row, alive = rollout.completion[1, 0], rollout.mask[1, 0]
  whole = np.concatenate([tokens[mask], row[alive]])[None]
  positions = np.arange(whole.shape[1])[None]
  causal = np.tril(np.ones((1, whole.shape[1], whole.shape[1]), bool))
  logits = model.apply(
    {'params': params}, whole, positions=positions, attention_mask=causal
  ).logits
  law = jax.nn.log_softmax(logits[0, mask.sum() - 1 : -1], -1)
  expected = np.take_along_axis(law, whole[0, mask.sum() :][:, None], -1)[:, 0]
  np.testing.assert_allclose(
    rollout.log_prob[1, 0][alive], expected, rtol=1e-4, atol=1e-4
  )
  init = jax.eval_shape(policy.init, jax.random.key(0))
  assert jax.tree.map(lambda x: x.shape, init) == jax.tree.map(
    lambda x: x.shape, params
  )


@pytest.mark.parametrize('name', STRANGERS)
def test_their_checkpoints(name, tmp_path):
  """Written, read into eight shards and by the library: no bit changes."""
  _, params = tiny(name)
  path = str(tmp_path / 'x')
  official.save_official(jax.tree.map(jnp.asarray, params), None, path)
  mesh = sharding.make_mesh(data=4, model=2)
  like = sharding.tree_structs(params, mesh)
  loaded = official.load(path, None, like)
  test_load.same(loaded, params)
  assert jax.tree.map(lambda x: x.sharding, loaded) == jax.tree.map(
    lambda x: x.sharding, like
  )
  test_load.same(gm.ckpts.load_params(path), params)


def test_turns_of_gemma_4():
  """As the package that the library writes its conversations with."""
  tok = test_tokenizer.with_turns(marks=('<|turn>', '<turn|>'))
  speaker = dict(system=dialog.System, user=dialog.User, assistant=dialog.Model)
  messages = [{'role': 'system', 'content': 'Be short.'}, *test_tokenizer.HELLO]
  for talk in messages, messages[1:]:
    turns = [speaker[m['role']](m['content'].strip()) for m in talk]
    text = dialog.Conversation(*turns).as_text(format='gemma4')
    ids = tokenizer.chat(tok, talk, system=False)
    assert ids == [tok.bos_id, *tok.encode(text)]


def test_no_logits_where_none_are_read():
  """The library's head is gone from the program of `hidden`."""
  config = CONFIGS['gemma3']
  policy = adapter.make(library(config), temperature=1.0, dtype='float32')
  params = nested(config, random_params(config))
  tokens, mask = prompts().tokens, prompts().mask
  hidden = lambda params: policy.hidden(params, tokens, mask)
  text = jax.jit(hidden).lower(params).compile().as_text()
  assert 'f32[3,5,24]' in text
  assert 'f32[3,5,37]' not in text and 'f32[15,37]' not in text


def test_models_by_name():
  model = adapter.model('Gemma3_4B')
  assert model.config.vision_encoder is None and model.dtype == jnp.float32
  assert adapter.model('Gemma2_2B').config.num_embed == 256_128
  with pytest.raises(UserError, match=r"no model 'Gemma5'; known .*Gemma2_2B"):
    adapter.model('Gemma5')


@pytest.fixture
def release(tmp_path, monkeypatch):
  """A tiny Gemma 3n of the library's, as a checkpoint and a vocabulary."""
  small, params = tiny('Gemma3n_E2B')
  sizes = dataclasses.replace(small.config, num_embed=128)

  class Gemma3n_Tiny(gm.nn.Gemma3n_E2B):
    config: object = sizes

  monkeypatch.setattr(gm.nn, 'Gemma3n_Tiny', Gemma3n_Tiny, raising=False)
  shapes = jax.eval_shape(
    adapter.make(Gemma3n_Tiny(), temperature=1.0, dtype='float32').init,
    jax.random.key(0),
  )
  rng = np.random.default_rng(3)
  params = jax.tree.map(
    lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes
  )
  official.save_official(
    jax.tree.map(jnp.asarray, params), None, str(tmp_path / 'weights')
  )
  content = test_tokenizer.with_turns().processor.serialized_model_proto()
  (tmp_path / 'tokenizer.model').write_bytes(content)
  return tmp_path, params


def library_config(folder):
  toy.get_config('')
  config = test_load.gemma_config(folder)
  config.model.update(name='Gemma3n_Tiny', scan=False, remat='none')
  config.model.sizes = {}
  return config


def test_a_run_of_a_library_model(release):
  """From its checkpoint, sharded, trained, and into a checkpoint it reads."""
  folder, params = release
  config = library_config(folder)
  config.mesh.data, config.mesh.model = 4, 2
  workdir = str(folder / 'run')
  toy.run('train', config, workdir)
  mesh = sharding.make_mesh(**config.mesh)
  policy = policies.make_policy(config.model, test_load.VOCAB)
  reference, base = load.load_frozen(config, policy, workdir, mesh)
  assert base == {}
  test_load.same(reference, params)
  trained = toy.saved(workdir, 'train', 2)['params']
  moved = jax.tree.map(lambda a, b: (a != b).any(), trained, params)
  assert sum(jax.tree.leaves(moved)) > len(jax.tree.leaves(moved)) / 2
  # The arrays that matter lie in shards: the table of 128 tokens is in 8.
  table = reference['embedder']['input_embedding']
  assert {s.data.shape for s in table.addressable_shards} == {(16, 24)}
  export.main(workdir, str(folder / 'out'), 'last', 'official', 'float32')
  test_load.same(gm.ckpts.load_params(folder / 'out'), trained)
  with pytest.raises(UserError, match='Hugging Face folders are for gemma_2b'):
    export.main(workdir, str(folder / 'hf'), 'last', 'hf', 'float32')


@pytest.mark.parametrize(
  'changes, says',
  [
    ({'model.lora.rank': 2}, 'model.lora.rank to 0'),
    ({'model.scan': True}, 'set model.scan to False, model.remat to none'),
    ({'tokenizer.vocab_size': 129}, 'larger than the 128 embedding rows'),
    ({'model.name': 'Gemma3n_X'}, "has no model 'Gemma3n_X'; known are"),
  ],
)
def test_a_library_model_has_limits(release, changes, says):
  config = library_config(release[0])
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=says):
    policies.make_policy(config.model, config.tokenizer.vocab_size)
