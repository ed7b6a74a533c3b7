"""Our folders in transformers and peft, and theirs here; on CPU, float32."""

import copy
import dataclasses
import functools
import http.server
import json
import os
import pathlib
import subprocess
import sys
import threading

os.environ['HF_HUB_OFFLINE'] = '1'  # this process asks nobody

from folders import export, exported, read
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_hf_adapter
import test_hf_config
import test_hf_reader
from turns import TEXTS, vocabulary

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import stacks
from bond_jax.weights.huggingface import adapter, reader, writer

why = 'needs requirements-hf.txt'
torch = pytest.importorskip('torch', reason=why)
peft = pytest.importorskip('peft', reason=why)
transformers = pytest.importorskip('transformers', reason=why)

ROOT = pathlib.Path(__file__).parents[2]
LENGTH, NEW = 15, 64  # of prompts, of greedy continuations

_SIZES = dict(vocab_size=64, features=32, head_size=8, feed_forward=48)
CONFIGS = {
    # A remainder of two layers; windows that the sequences outgrow twelvefold.
    'gemma3': gemma.Config(
        **_SIZES, layers=5, heads=4, kv_heads=2,
        pattern=('local', 'local', 'global'), window=6, qk_norm=True,
        post_norms=True, query_scale=12**-0.5, final_softcap=8.0,
        global_rope_base=1_000_000.0, global_rope_scale=8.0,
        gating_transposed=True,
    ),
    'gemma3_one_kv_head': gemma.Config(
        **_SIZES, layers=3, heads=4, kv_heads=1, pattern=('local', 'global'),
        window=6, qk_norm=True, post_norms=True, gating_transposed=True,
        global_rope_base=1_000_000.0,
    ),
    'gemma2': gemma.Config(
        **{**_SIZES, 'vocab_size': 70}, layers=4, heads=4, kv_heads=2,
        pattern=('local', 'global'), window=6, post_norms=True,
        query_scale=12**-0.5, attention_softcap=2.0, final_softcap=4.0,
        used_vocab=64,
    ),
    'gemma1_multi_query': gemma.Config(
        **{**_SIZES, 'vocab_size': 70}, layers=2, heads=4, kv_heads=1,
        used_vocab=64,
    ),
    'gemma1_multi_head': gemma.Config(
        **_SIZES, layers=2, heads=3, kv_heads=3, used_vocab=64,
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
  torch.set_num_threads(1)


@functools.cache
def params_of(name):
  """Random parameters, none of them zero but rows that no token uses."""
  config = CONFIGS[name]
  rng = np.random.default_rng(len(name))
  params = jax.tree.map(
    lambda x: (0.4 * rng.standard_normal(x.shape)).astype(np.float32),
    stacks.init_shapes(config),
  )
  # A head that says more than to repeat the token that it is beside.
  params['embedder']['input_embedding'] *= 0.2
  params['embedder']['input_embedding'][64:] = 0
  params['final_norm']['scale'] += 6
  return params


def policy_of(config):
  return gemma.make(
    config, temperature=1.0, dtype='float32', scan=False, remat='none'
  )


def logits(config, params, tokens, mask=None):
  policy = policy_of(config)

  @jax.jit
  def forward(params):
    seen = np.ones_like(tokens, bool) if mask is None else mask
    hidden = policy.hidden(params, tokens, seen)
    return policy.logits(params, hidden)[..., :64]

  return np.asarray(forward(params))


def greedy(config, params, prompt):
  """64 tokens after each prompt, each the likeliest, with our cache."""
  policy = policy_of(config)

  @jax.jit
  def decode(params):
    decoder = policy.decoder(policy.prepare(params))
    hidden, prefix = decoder.prefill(prompt, prompt >= 0)
    first = decoder.logits(hidden).argmax(-1)

    def step(state, _):
      token, cache = state
      alive = jnp.ones(len(prompt), bool)
      hidden, cache = decoder.step(token, alive, cache)
      return (decoder.logits(hidden).argmax(-1), cache), token

    cache = decoder.start(prefix, 1, NEW)
    return jax.lax.scan(step, (first, cache), None, length=NEW)[1].T

  return np.asarray(decode(params))


def tokens_of(rows, size):
  return np.random.default_rng(7).integers(4, 64, (rows, size))


def load(folder, cls=transformers.AutoModelForCausalLM):
  """Their model, told everything by the folder; nothing lacks in it."""
  model, info = cls.from_pretrained(
    folder,
    dtype=torch.float32,
    attn_implementation='eager',
    output_loading_info=True,
  )
  assert not any(info.values()), info
  return model.eval()


def theirs(model, tokens, mask=None):
  with torch.no_grad():
    mask = mask if mask is None else torch.tensor(mask.astype(np.int64))
    out = model(torch.tensor(tokens), attention_mask=mask).logits
  return out.float().numpy()


def close(ours, other):
  """1e-5 of the largest logit."""
  assert np.abs(other).max() > 1
  np.testing.assert_allclose(ours, other, atol=1e-5 * np.abs(other).max())


def shards(config):
  mesh = sharding.make_mesh(data=4, model=2)
  shapes = stacks.init_shapes(config)
  return sharding.tree_structs(shapes, mesh)


@pytest.mark.parametrize('name', CONFIGS)
def test_logits_after_export(tmp_path, name):
  """Sequences of five windows, whole and padded on the left."""
  config, params = CONFIGS[name], params_of(name)
  path = str(tmp_path / 'x')
  export(params, config, path, 30_000, dtype='float32')
  model = load(path)
  tokens = tokens_of(3, 30)
  close(logits(config, params, tokens), theirs(model, tokens))
  mask = np.arange(30)[None] >= np.array([[0], [4], [11]])
  ours, other = (
    logits(config, params, tokens, mask),
    theirs(model, tokens, mask),
  )
  close(ours[mask], other[mask])


@pytest.mark.parametrize('name', CONFIGS)
def test_greedy_completions_are_the_same(tmp_path, name):
  config, params = CONFIGS[name], params_of(name)
  writer.export(params, config, str(tmp_path / 'x'), dtype='float32')
  model = load(str(tmp_path / 'x'))
  model.generation_config.eos_token_id = None  # or a row may end early
  prompt = tokens_of(3, LENGTH)
  with torch.no_grad():
    out = model.generate(
      torch.tensor(prompt),
      attention_mask=torch.ones(prompt.shape, dtype=torch.long),
      max_new_tokens=NEW,
      do_sample=False,
    )
  expected = out.numpy()[:, LENGTH:]
  assert expected.shape == (3, NEW)
  assert len(np.unique(expected)) > 8
  np.testing.assert_array_equal(greedy(config, params, prompt), expected)


def test_they_sample_the_law_that_was_trained(tmp_path):
  """The folder switches their cutting of the tail off."""
  config = CONFIGS['gemma3']
  path = str(tmp_path / 'x')
  writer.export(
    params_of('gemma3'), config, path, dtype='float32', temperature=0.7
  )
  said = load(path).generation_config
  assert (said.do_sample, said.temperature) == (True, 0.7)
  assert (said.top_k, said.top_p) == (0, 1.0)


# -- From them


def their_model(config, seed=0):
  """A model of theirs with random weights, norms included."""
  raw = writer.config_json.to_json(config, 'float32')
  kind = raw.pop('model_type')
  torch.manual_seed(seed)
  model = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(kind, **raw), attn_implementation='eager'
  )
  with torch.no_grad():
    for w in model.parameters():
      w.normal_(std=0.4)
  return model.eval()


@pytest.mark.parametrize('name', CONFIGS)
@pytest.mark.parametrize('size', ['10GB', '20KB'])
def test_from_them_to_us_and_back(tmp_path, name, size):
  """What save_pretrained writes; bit for bit, and with equal logits."""
  config = CONFIGS[name]
  model = their_model(config)
  folder = str(tmp_path / 'theirs')
  model.save_pretrained(folder, max_shard_size=size)
  files = [f for f in os.listdir(folder) if f.endswith('.safetensors')]
  assert (len(files) > 1) == (size == '20KB')
  params = reader.load(folder, config, shards(config))
  tokens = tokens_of(2, 20)
  close(logits(config, params, tokens), theirs(model, tokens))
  writer.export(params, config, str(tmp_path / 'back'), dtype='float32')
  back = load(str(tmp_path / 'back')).state_dict()
  assert list(back) == list(model.state_dict())
  for key, w in model.state_dict().items():
    assert torch.equal(w, back[key]), key


@functools.cache
def sees_images(folder):
  """A model of theirs with an image encoder, saved; its text has more rows."""
  config = CONFIGS['gemma3_one_kv_head']
  text = writer.config_json.to_json(config, 'float32')
  model = transformers.Gemma3ForConditionalGeneration(
    transformers.Gemma3Config(
      text_config={**text, 'vocab_size': 70, 'architectures': None},
      vision_config=dict(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, image_size=8, patch_size=4,
      ),
      mm_tokens_per_image=1, image_token_index=65, boi_token_index=66,
      eoi_token_index=67, attn_implementation='eager',
    )
  )  # fmt: skip
  torch.manual_seed(1)
  with torch.no_grad():
    for w in model.parameters():
      w.normal_(std=0.4)
  model.save_pretrained(folder)
  return config, model.eval()


def test_the_text_of_a_model_that_sees_images(tmp_path):
  config, model = sees_images(str(tmp_path / 'x'))
  params = reader.load(str(tmp_path / 'x'), config, shards(config))
  tokens = tokens_of(2, 20)
  expected = theirs(model, tokens)[..., :64]
  close(logits(config, params, tokens), expected)
  writer.export(params, config, str(tmp_path / 'text'), dtype='float32')
  text = load(str(tmp_path / 'text'))
  assert isinstance(text, transformers.Gemma3ForCausalLM)
  close(theirs(text, tokens), expected)


# -- What says the same thing twice: what they take of it


def norm_of(folder, **kwargs):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), dtype=torch.float32, **kwargs
  )
  return model.model.norm.weight.detach().numpy()


@pytest.mark.parametrize('what', test_hf_reader.BESIDE)
def test_one_file_comes_first(tmp_path, what):
  _, params = exported('gemma3', tmp_path / 'x')
  test_hf_reader.BESIDE[what](tmp_path / 'x')
  scale = params['final_norm']['scale']
  np.testing.assert_array_equal(norm_of(tmp_path / 'x'), scale)


def test_a_tensor_in_two_shards(tmp_path):
  exported('gemma3', tmp_path / 'x', shard_bytes=3000)
  test_hf_reader.twice(tmp_path / 'x')
  assert (norm_of(tmp_path / 'x') == 9).all()


def test_a_file_that_a_config_names_comes_first(tmp_path):
  exported('gemma3', tmp_path / 'x')
  tensors = test_hf_reader.load_file(tmp_path / 'x' / reader.SINGLE)
  test_hf_reader.save_file(
    {k: 0 * x for k, x in tensors.items()}, tmp_path / 'x' / 'other.safetensors'
  )
  test_hf_reader.change(
    tmp_path / 'x', transformers_weights='other.safetensors'
  )
  assert not norm_of(tmp_path / 'x').any()


def test_an_adapter_beside_a_model_is_applied(tmp_path):
  exported('gemma3', tmp_path / 'x')
  train_by_hand(load(str(tmp_path / 'x')), ['q_proj'], str(tmp_path / 'x'))
  model = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / 'x'))
  assert any('lora_A' in name for name, _ in model.named_modules())
  config, _ = test_hf_reader.params_of('gemma3')
  with pytest.raises(UserError, match='has adapter_config.json'):
    reader.load(str(tmp_path / 'x'), config, shards(config))


@pytest.mark.parametrize('name', test_hf_config.KEYS)
def test_keys_that_say_the_same_thing(name):
  """In the numbers that turn the heads, and in the windows."""
  family, keys, (kinds, base, scale, local) = test_hf_config.KEYS[name]
  raw = test_hf_config.described(family, copy.deepcopy(keys))
  model = transformers.AutoModel.from_config(
    transformers.AutoConfig.for_model(raw.pop('model_type'), **raw)
  )
  turns = {
    key.removesuffix('inv_freq').rstrip('_'): x.numpy()
    for key, x in model.rotary_emb.named_buffers()
    if 'original' not in key
  }
  exponent = -np.arange(0, 8, 2) / 8
  for kind, of_theirs, b, s in (
    ('G', test_hf_config.FULL, base, scale),
    ('L', test_hf_config.SLIDING, local, 1),
  ):
    if kind in kinds:
      found = turns[of_theirs if family == 'gemma3_text' else '']
      np.testing.assert_allclose(found, b**exponent / s, rtol=1e-5)
  windows = [getattr(x.self_attn, 'sliding_window', None) for x in model.layers]
  assert ''.join('GL'[w is not None] for w in windows) == kinds


def test_padding_beyond_the_vocabulary(tmp_path):
  """As resize_token_embeddings leaves it, of which no row is drawn here."""
  config = CONFIGS['gemma3']
  model = their_model(config)
  model.resize_token_embeddings(64 + 53)
  model.save_pretrained(tmp_path / 'x')
  assert read(tmp_path / 'x')['vocab_size'] == 64 + 53
  params = reader.load(str(tmp_path / 'x'), config, shards(config))
  tokens = tokens_of(2, 20)
  expected = theirs(model, tokens)[..., :64]
  close(logits(config, params, tokens), expected)
  writer.export(params, config, str(tmp_path / 'y'), dtype='float32')
  close(theirs(load(str(tmp_path / 'y')), tokens), expected)
  low = str(tmp_path / 'low')
  adapted = train_by_hand(load(str(tmp_path / 'x')), ['q_proj'], low)
  config = dataclasses.replace(config, lora_scale=1.5)
  params = lora.join(params, adapter_of(config, 'attn/q', low))
  close(logits(config, params, tokens), theirs(adapted, tokens)[..., :64])


# -- Adapters


def adapters_of(config, targets='attn|mlp'):
  tree = jax.eval_shape(
    lambda: lora.init(config, jax.random.key(0), rank=2, targets=targets)
  )
  rng = np.random.default_rng(3)
  return jax.tree.map(
    lambda x: (0.2 * rng.standard_normal(x.shape)).astype(np.float32), tree
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_adapters_in_peft_and_merged(tmp_path, name):
  config = dataclasses.replace(CONFIGS[name], lora_scale=1.25)
  params, adapters = params_of(name), adapters_of(config)
  base, low, whole = (str(tmp_path / x) for x in ('base', 'low', 'whole'))
  writer.export(params, config, base, dtype='float32')
  writer.export(params, config, whole, dtype='float32', lora=adapters)
  adapter.export_adapter(adapters, config, low, base=base)
  tokens = tokens_of(2, 20)
  ours = logits(config, lora.join(params, adapters), tokens)
  plain = theirs(load(base), tokens)
  adapted = peft.PeftModel.from_pretrained(load(base), low)
  assert np.abs(ours - plain).max() > 0.1 * np.abs(plain).max()
  close(ours, theirs(adapted, tokens))
  merged = load(whole)
  close(ours, theirs(merged, tokens))
  by_peft = adapted.merge_and_unload().state_dict()
  for key, w in merged.state_dict().items():
    torch.testing.assert_close(w, by_peft[key], rtol=1e-5, atol=1e-6)


def test_an_adapter_of_a_model_that_sees_images(tmp_path):
  """None of its modules is made in the image encoder, none is left out."""
  base, low = str(tmp_path / 'base'), str(tmp_path / 'low')
  config, _ = sees_images(base)
  config = dataclasses.replace(config, lora_scale=0.5)
  params = reader.load(base, config, shards(config))
  adapters = adapters_of(config)
  adapter.export_adapter(adapters, config, low, base=base)
  model = load(base, transformers.Gemma3ForConditionalGeneration)
  adapted = peft.PeftModel.from_pretrained(model, low)
  names = [k for k, _ in adapted.named_parameters() if 'lora_' in k]
  assert len(names) == 14 * config.layers
  assert all('language_model' in k for k in names)
  tokens = tokens_of(2, 20)
  ours = logits(config, lora.join(params, adapters), tokens)
  close(ours, theirs(adapted, tokens)[..., :64])


def train_by_hand(model, modules, folder, **kwargs):
  """Saves an adapter that peft has made, neither half of it zero."""
  adapted = peft.get_peft_model(
    model,
    peft.LoraConfig(
      r=4, lora_alpha=6, target_modules=modules, task_type='CAUSAL_LM', **kwargs
    ),
  ).eval()
  torch.manual_seed(5)
  for name, x in adapted.named_parameters():
    if 'lora_' in name:
      torch.nn.init.normal_(x, std=0.2)
  adapted.save_pretrained(folder)
  return adapted


def adapter_of(config, targets, folder):
  shapes = jax.eval_shape(
    lambda: lora.init(config, jax.random.key(0), rank=4, targets=targets)
  )
  like = sharding.tree_structs(shapes, sharding.make_mesh(data=4, model=2))
  return adapter.load_adapter(folder, config, like)


SOME = 'q_proj o_proj down_proj'
ALL = f'{SOME} k_proj v_proj gate_proj up_proj'


@pytest.mark.parametrize(
  'name, modules, targets',
  [
    ('gemma3', SOME, 'attn/q|attn_vec|linear'),
    ('gemma3', ALL, 'attn|mlp'),
    ('gemma2', ALL, 'attn|mlp'),
    ('gemma1_multi_head', ALL, 'attn|mlp'),
  ],
)
def test_an_adapter_that_peft_has_saved(tmp_path, name, modules, targets):
  """Keys and values, gate and up, each with an A of its own."""
  config = dataclasses.replace(CONFIGS[name], lora_scale=1.5)
  base, low = str(tmp_path / 'base'), str(tmp_path / 'low')
  writer.export(params_of(name), config, base, dtype='float32')
  tokens = tokens_of(2, 20)
  plain = theirs(load(base), tokens)
  adapted = train_by_hand(load(base), modules.split(), low)
  other = theirs(adapted, tokens)
  assert np.abs(other - plain).max() > 0.1 * np.abs(plain).max()
  adapters = adapter_of(config, targets, low)
  close(logits(config, lora.join(params_of(name), adapters), tokens), other)


def test_an_adapter_that_adapts_an_image_encoder_too(tmp_path):
  """As one does that names modules: the text model's part is read."""
  base, low = str(tmp_path / 'base'), str(tmp_path / 'low')
  config, _ = sees_images(base)
  config = dataclasses.replace(config, lora_scale=1.5)
  params = reader.load(base, config, shards(config))
  model = load(base, transformers.Gemma3ForConditionalGeneration)
  adapted = train_by_hand(model, ['q_proj', 'k_proj', 'v_proj'], low)
  names = [k for k, _ in adapted.named_parameters() if 'lora_' in k]
  assert any('vision_tower' in k for k in names)
  tokens = tokens_of(2, 20)
  adapters = adapter_of(config, 'attn/(q|kv)_', low)
  ours = logits(config, lora.join(params, adapters), tokens)
  close(ours, theirs(adapted, tokens)[..., :64])


@pytest.mark.parametrize('what', ['a name', 'a pickle'])
def test_of_two_adapters_peft_reads_ours(tmp_path, what):
  config = dataclasses.replace(CONFIGS['gemma2'], lora_scale=1.5)
  base, low = str(tmp_path / 'base'), tmp_path / 'low'
  writer.export(params_of('gemma2'), config, base, dtype='float32')
  adapted = train_by_hand(load(base), ALL.split(), str(low))
  if what == 'a name':
    rename = functools.partial(test_hf_adapter.named, name='default')
    test_hf_adapter.rewrite(low, rename)
  else:
    (low / 'adapter_model.bin').write_bytes(b'of an earlier save')
  tokens = tokens_of(2, 20)
  other = theirs(peft.PeftModel.from_pretrained(load(base), str(low)), tokens)
  close(theirs(adapted, tokens), other)
  adapters = adapter_of(config, 'attn|mlp', str(low))
  params = lora.join(params_of('gemma2'), adapters)
  close(logits(config, params, tokens), other)


@pytest.mark.parametrize(
  'modules, more',
  [
    (['q_proj'], dict(layers_to_transform=[0, 2])),
    (['q_proj'], dict(layers_to_transform=1)),
    (r'.*layers\.[13]\..*q_proj', {}),
  ],
)
def test_an_adapter_of_some_layers(tmp_path, modules, more):
  config = dataclasses.replace(CONFIGS['gemma2'], lora_scale=1.5)
  base, low = str(tmp_path / 'base'), str(tmp_path / 'low')
  writer.export(params_of('gemma2'), config, base, dtype='float32')
  train_by_hand(load(base), modules, low, **more)
  with pytest.raises(UserError, match='not of all its layers'):
    adapter_of(config, 'attn/q', low)


# -- Tokenizers

TALK = [
  {'role': 'user', 'content': ' the film?\n'},
  {'role': 'assistant', 'content': 'good '},
  {'role': 'user', 'content': 'and the story?'},
]


@pytest.mark.parametrize('turns', [True, False])
@pytest.mark.parametrize('name', ['gemma3', 'gemma2'])
def test_their_tokenizer_of_our_folder(tmp_path, turns, name):
  path = vocabulary(tmp_path, turns)
  tok = tokenizer_lib.load(path)
  folder = str(tmp_path / 'x')
  writer.export(
    params_of(name), CONFIGS[name], folder, dtype='float32',
    tokenizer_path=path,
  )  # fmt: skip
  other = transformers.AutoTokenizer.from_pretrained(folder)
  assert len(other) == tok.vocab_size
  for text in TEXTS:
    ids = other(text)['input_ids']
    assert ids == [tok.bos_id, *tok.encode(text)], text
    assert other.decode(ids, skip_special_tokens=True) == tok.decode(ids)
  said = load(folder).generation_config
  assert said.eos_token_id == list(tok.stop_ids)
  if not turns:
    assert other.chat_template is None
    return
  chat = functools.partial(
    other.apply_chat_template, add_generation_prompt=True, return_dict=False
  )
  system = name == 'gemma3'
  assert chat(TALK) == tokenizer_lib.chat(tok, TALK, system=system)
  talk = [{'role': 'system', 'content': 'a film \n'}, *TALK]
  if system:
    assert chat(talk) == tokenizer_lib.chat(tok, talk, system=True)
  else:
    with pytest.raises(Exception, match='no system turn'):
      chat(talk)
  with pytest.raises(Exception, match='take turns'):
    chat(TALK[1:])
  assert chat(TALK[:1], add_generation_prompt=False)[-2] == tok.end_of_turn


def test_they_read_tokenizer_json_first(tmp_path):
  """So that tokenizer.model must be of the same vocabulary."""
  turns, plain = tmp_path / 'turns', tmp_path / 'plain'
  for folder in (turns, plain):
    folder.mkdir()
    path = vocabulary(folder, folder == turns)
    exported('gemma3', folder / 'x', tokenizer_path=path)
  theirs_ = transformers.AutoTokenizer.from_pretrained(turns / 'x')
  theirs_.save_pretrained(turns / 'x')
  ours = tokenizer_lib.load(str(turns / 'x'))
  assert len(theirs_) == ours.vocab_size
  content = (plain / 'x' / 'tokenizer.model').read_bytes()
  (turns / 'x' / 'tokenizer.model').write_bytes(content)
  again = transformers.AutoTokenizer.from_pretrained(turns / 'x')
  assert again(TEXTS[0])['input_ids'] == theirs_(TEXTS[0])['input_ids']
  with pytest.raises(UserError, match='transformers reads the former'):
    tokenizer_lib.load(str(turns / 'x'))


# -- Repositories


class Hub(http.server.BaseHTTPRequestHandler):
  """One repository of one commit, as the hub serves it."""

  folder: str
  commit = 'c0ffee' + 34 * '0'

  def do_GET(self):
    at = self.path.partition('?')[0]
    if at == f'/api/models/some/gemma/tree/{self.commit}':
      rows = [
        dict(type='file', path=f, oid='0' * 40, size=self._size(f))
        for f in os.listdir(self.folder)
      ]
      return self._send(json.dumps(rows).encode())
    name = at.removeprefix(f'/some/gemma/resolve/{self.commit}/')
    if name == at or not os.path.exists(os.path.join(self.folder, name)):
      return self._send(b'', 404, **{'X-Error-Code': 'RepoNotFound'})
    with open(os.path.join(self.folder, name), 'rb') as f:
      return self._send(f.read(), ETag=f'"{name}"')

  do_HEAD = do_GET

  def _size(self, name):
    return os.path.getsize(os.path.join(self.folder, name))

  def _send(self, content, status=200, **headers):
    self.send_response(status)
    headers |= {'X-Repo-Commit': self.commit}
    headers |= {'Content-Length': len(content)}
    for key, value in headers.items():
      self.send_header(key, str(value))
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)

  def log_message(self, *args):
    pass


def test_a_repository_by_its_commit(tmp_path):
  """Downloaded once; then the server may be gone. Other names are one line."""
  folder = tmp_path / 'x'
  writer.export(
    params_of('gemma3'), CONFIGS['gemma3'], str(folder), dtype='float32'
  )
  (folder / 'adapter_config.json').write_text('{}')
  (folder / 'pytorch_model.bin').write_text('not needed')
  Hub.folder = str(folder)
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  script = """
import sys
from bond_jax.weights.huggingface import reader as hf
from bond_jax.errors import UserError
for path in sys.argv[1:]:
  try:
    print(hf.resolve(path))
  except UserError as e:
    print('refused', e)
"""
  env = {
    **os.environ,
    'HF_ENDPOINT': f'http://127.0.0.1:{server.server_port}',
    'HF_HOME': str(tmp_path / 'cache'),
    'HF_HUB_OFFLINE': '0',
    'HF_HUB_DISABLE_TELEMETRY': '1',
    'HF_HUB_DISABLE_XET': '1',
    'PYTHONPATH': str(ROOT),
  }

  def resolve(*paths):
    out = subprocess.run(
        [sys.executable, '-c', script, *paths], env=env, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return out.stdout.splitlines()

  here = f'some/gemma@{Hub.commit}'
  try:
    found, other = resolve(here, f'some/other@{Hub.commit}')
  finally:
    server.shutdown()
  assert other.startswith(f'refused cannot download some/other@{Hub.commit}')
  assert sorted(os.listdir(found)) == sorted(
    f for f in os.listdir(folder) if f != 'pytorch_model.bin'
  )
  assert resolve(here) == [found]
  os.remove(os.path.join(found, 'adapter_config.json'))
  config = CONFIGS['gemma3']
  jax.tree.map(
    np.testing.assert_array_equal,
    reader.load(found, config, shards(config)),
    params_of('gemma3'),
  )


def test_a_folder_of_another_architecture(tmp_path):
  model = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      vocab_size=64, hidden_size=16, intermediate_size=16,
      num_hidden_layers=1, num_attention_heads=2,
    )
  )  # fmt: skip
  model.save_pretrained(tmp_path)
  config = CONFIGS['gemma3']
  with pytest.raises(UserError, match='architecture LlamaForCausalLM'):
    reader.load(str(tmp_path), config, shards(config))
