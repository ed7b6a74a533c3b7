"""GGUF files out and in: the numbers, the vocabulary, or one clear error."""

import dataclasses
import pathlib
import struct
import sys

from conftest import core, random_params
from folders import like_of, mesh_of
import gguf
import jax
import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2
import turns

from bond_jax.data import gguf as gguf_file
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.models.gemma import configs
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import official, stacks
from bond_jax.weights.gguf import reader, writer
from bond_jax.weights.huggingface import config_json
from bond_jax.weights.huggingface import layout as hf_layout

KINDS = [
  k.name
  for k in gguf.GGML_QUANT_SIZES
  if k.name in ('F32', 'F16') or k in gguf.quants._type_traits
]
TEXTS = (
  'the film', '  two  spaces\n\n\tand a tab', 'naïve 日本 🙂', '<unused0> 1234',
  '<start_of_turn>user\nhi<end_of_turn>\n', 'def f(x):\n    return x',
)  # fmt: skip


@pytest.fixture(scope='module')
def vocabulary(tmp_path_factory):
  """Path of a SentencePiece model with turns, and its number of pieces."""
  path = turns.vocabulary(tmp_path_factory.mktemp('vocabulary'))
  return str(path), tokenizer_lib.load(str(path)).vocab_size


def families(rows):
  """One model of each family; the vocabulary fills all rows but some."""
  common = dict(vocab_size=rows + 3, used_vocab=rows, features=32, heads=2,
                kv_heads=1, head_size=16, feed_forward=64)  # fmt: skip
  return {
    'gemma3': gemma.Config(
      **common, layers=5, pattern=('local', 'local', 'global'), window=3,
      qk_norm=True, post_norms=True, global_rope_base=1e6,
      local_rope_base=5e3, global_rope_scale=8.0, gating_transposed=True,
    ),
    'gemma2': gemma.Config(
      **common, layers=2, pattern=('local', 'global'), window=3,
      post_norms=True, attention_softcap=1.5, final_softcap=4.0,
      gating_transposed=True,
    ),
    'gemma': gemma.Config(**common, layers=2),
  }  # fmt: skip


def made(config, path, vocabulary, seed=0, **kwargs):
  """A folder of random weights; returns the file and the weights."""
  params = random_params(config, seed)
  params['embedder']['input_embedding'][config.used_vocab :] = 0
  kwargs = {'dtype': 'float32', 'tokenizer_path': vocabulary[0], **kwargs}
  writer.export(params, config, str(path), **kwargs)
  return str(path / writer.FILE), params


# -- Out and in


@pytest.mark.parametrize('family', ['gemma3', 'gemma2', 'gemma'])
def test_out_and_in(tmp_path, vocabulary, family):
  config = families(vocabulary[1])[family]
  file, params = made(config, tmp_path / 'out', vocabulary)
  found = reader.read_config(gguf_file.read(file))
  assert config_json.essence(found) == config_json.essence(config)
  for mesh in mesh_of(1, 1), mesh_of(2, 4):
    loaded = official.load(file, config, like_of(config, mesh))
    # The scale of a norm is one more in the file: it loses a bit there.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 0, 2e-7),
                 loaded, params)  # fmt: skip
    matrices = {k: x for k, x in stacks.nested(config, params) if x.ndim > 1}
    for name, x in stacks.nested(config, loaded):
      if name in matrices:
        np.testing.assert_array_equal(x, matrices[name])


@pytest.mark.parametrize('family', ['gemma3', 'gemma2', 'gemma'])
def test_as_the_package_reads_it(tmp_path, vocabulary, family):
  config = families(vocabulary[1])[family]
  file, params = made(config, tmp_path / 'out', vocabulary)
  theirs = gguf.GGUFReader(file)
  value = lambda key: theirs.fields[key].contents()
  assert value('general.architecture') == family
  assert value(f'{family}.block_count') == config.layers
  assert value('tokenizer.ggml.model') == 'llama'
  assert value('tokenizer.ggml.add_space_prefix') is False
  assert len(value('tokenizer.ggml.tokens')) == vocabulary[1]
  tensors = {x.name: x.data for x in theirs.tensors}
  ours = dict(stacks.nested(config, params))
  norm = tensors['blk.1.ffn_norm.weight']
  np.testing.assert_array_equal(norm, ours['layer_1/pre_ffw_norm/scale'] + 1)
  down = tensors['blk.1.ffn_down.weight']
  np.testing.assert_array_equal(down, ours['layer_1/mlp/linear'].T)
  if family == 'gemma3':
    assert value('gemma3.attention.sliding_window_pattern') == 3
    assert value('gemma3.rope.freq_base_swa') == 5e3
    assert value('gemma3.rope.scaling.factor') == 8


@pytest.mark.parametrize('dtype, error', [('float16', 6e-4), ('bfloat16', 4e-3),
                                          ('q8_0', 4.5e-3)])  # fmt: skip
def test_in_fewer_bits(tmp_path, vocabulary, dtype, error):
  config = families(vocabulary[1])['gemma3']
  file, params = made(config, tmp_path / 'out', vocabulary, dtype=dtype)
  kinds = {x.name: x.tensor_type.name for x in gguf.GGUFReader(file).tensors}
  assert kinds['token_embd.weight'] == writer.KINDS[dtype]
  assert kinds['blk.0.attn_q_norm.weight'] == 'F32'
  loaded = official.load(file, config, like_of(config, mesh_of(1, 1)))
  worst = jax.tree.map(
    lambda a, b: float(abs(np.asarray(a) - b).max() / abs(b).max()),
    loaded, params,
  )  # fmt: skip
  assert 0 < max(jax.tree.leaves(worst)) < error


def test_adapters_are_merged(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma3']
  config = dataclasses.replace(config, lora_scale=2.0)
  adapters = lora.init(config, jax.random.key(0), rank=2, targets='attn|mlp')
  adapters = jax.tree.map(lambda x: x + 0.1, adapters)
  params = random_params(config, 0)
  writer.export(
    params, config, str(tmp_path / 'out'), dtype='float32',
    tokenizer_path=vocabulary[0], lora=adapters,
  )  # fmt: skip
  file = str(tmp_path / 'out' / writer.FILE)
  loaded = official.load(file, config, like_of(config, mesh_of(1, 1)))
  wanted = lora.merge(config, params, adapters)
  wanted['embedder']['input_embedding'][config.used_vocab :] = 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6, 2e-7),
               loaded, wanted)  # fmt: skip


# -- Every quantisation

BLOCKS = gemma.Config(
  vocab_size=16, features=256, layers=1, heads=1, kv_heads=1, head_size=256,
  feed_forward=256,
)  # fmt: skip


@pytest.mark.parametrize('kind', core(8, KINDS))
def test_a_quantisation(tmp_path, kind):
  kind = gguf.GGMLQuantizationType[kind]
  block, size = gguf.GGML_QUANT_SIZES[kind]
  rng = np.random.default_rng(int(kind))
  out = gguf.GGUFWriter(str(tmp_path / 'x.gguf'), 'gemma')
  writer._add_settings(out, BLOCKS, config_json.to_json(BLOCKS, 'float32'),
                       'gemma')  # fmt: skip
  names = reader.layout.tensor_names(BLOCKS, 'gemma')
  for name, shape in hf_layout.tensors(BLOCKS, BLOCKS.vocab_size).items():
    rows, kind_of = shape[0], kind
    if len(shape) == 1:
      rows, kind_of, width = 1, gguf.GGMLQuantizationType.F32, shape[0] * 4
    else:
      width = shape[1] // block * size
    raw = rng.integers(0, 60, (rows, width)).astype(np.uint8)
    raw = raw[0] if len(shape) == 1 else raw
    out.add_tensor(names[name], raw, raw_dtype=kind_of)
  out.write_header_to_file()
  out.write_kv_data_to_file()
  out.write_tensors_to_file()
  out.close()
  theirs = {
    x.name: gguf.quants.dequantize(x.data, x.tensor_type)
    for x in gguf.GGUFReader(tmp_path / 'x.gguf').tensors
  }
  mesh = mesh_of(2, 4)
  ours = official.load(str(tmp_path / 'x.gguf'), BLOCKS, like_of(BLOCKS, mesh))
  ours = dict(stacks.nested(BLOCKS, ours))
  table = ours['embedder/input_embedding']
  np.testing.assert_array_equal(table, theirs['token_embd.weight'])
  assert table.addressable_shards[0].data.size < table.size
  linear = ours['layer_0/mlp/linear']
  np.testing.assert_array_equal(linear, theirs['blk.0.ffn_down.weight'].T)
  up = ours['layer_0/mlp/gating_einsum'][1]
  np.testing.assert_array_equal(up, theirs['blk.0.ffn_up.weight'].T)
  scale = ours['layer_0/pre_ffw_norm/scale']
  np.testing.assert_array_equal(scale, theirs['blk.0.ffn_norm.weight'] - 1)


# -- The vocabulary


def test_the_vocabulary_comes_back(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma3']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  ours, theirs = tokenizer_lib.load(vocabulary[0]), tokenizer_lib.load(file)
  pieces = lambda t: [
    (x.piece, x.type, x.score)
    for x in sentencepiece_model_pb2.ModelProto.FromString(
      t.processor.serialized_model_proto()
    ).pieces
  ]
  assert pieces(ours) == pieces(theirs)
  assert ours.stop_ids == theirs.stop_ids
  assert len(ours.stop_ids) == 2
  for text in TEXTS:
    assert ours.encode(text) == theirs.encode(text), text
    assert theirs.processor.decode(theirs.encode(text)) == text


def test_as_llama_cpp_has_pieces(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma3']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  fields = gguf_file.read(file).fields
  kinds = dict(
    zip(
      fields['tokenizer.ggml.tokens'],
      fields['tokenizer.ggml.token_type'],
      strict=True,
    )
  )
  assert kinds['<start_of_turn>'] == gguf.TokenType.CONTROL
  assert kinds['<0x0A>'] == gguf.TokenType.BYTE
  assert kinds['▁film'] == gguf.TokenType.NORMAL
  ids = [fields[f'tokenizer.ggml.{n}_token_id'] for n in ('eos', 'eot')]
  assert ids == list(tokenizer_lib.load(file).stop_ids)
  assert '<start_of_turn>' in fields['tokenizer.chat_template']


def test_ids_that_differ_from_gemmas(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma3']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  end = {'tokenizer.ggml.eos_token_id': 6}  # of a model that answers
  other = tokenizer_lib.load(str(patched(file, tmp_path / 'x.gguf', **end)))
  assert other.sha256 == tokenizer_lib.load(file).sha256
  header = gguf_file.read(file)
  fields = dict(header.fields)
  pieces = fields['tokenizer.ggml.tokens']  # in the order of another family
  fields['tokenizer.ggml.tokens'] = [pieces[i] for i in (3, 2, 1, 0)] + pieces[
    4:
  ]
  content = gguf_file.sentencepiece_model(header._replace(fields=fields))
  with pytest.raises(UserError, match='PAD, EOS, BOS, UNK are'):
    tokenizer_lib.parse(content, 'x.gguf')


def test_rows_without_a_piece_are_none(tmp_path, vocabulary):
  header = _header(tmp_path, vocabulary)
  n = vocabulary[1]
  fields = dict(header.fields)
  fields['tokenizer.ggml.tokens'] += [f'[PAD{n}]', f'[PAD{n + 1}]']
  for name, value in ('scores', -1e3), ('token_type', gguf_file.UNUSED):
    key = f'tokenizer.ggml.{name}'
    fields[key] = np.append(fields[key], [value, value])
  content = gguf_file.sentencepiece_model(header._replace(fields=fields))
  assert content == gguf_file.sentencepiece_model(
    _header(tmp_path / 'again', vocabulary)
  )


def _header(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma']
  return gguf_file.read(made(config, tmp_path / 'out', vocabulary)[0])


# -- What cannot be read


def refused(file, config, match):
  with pytest.raises(UserError, match=match) as e:
    official.load(str(file), config, like_of(config, mesh_of(1, 1)))
  if 'found' not in str(e.value):  # a table of differences
    assert '\n' not in str(e.value)


def test_cut_anywhere(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  whole = pathlib.Path(file).read_bytes()
  cut = tmp_path / 'cut.gguf'
  for end in (0, 3, 4, 7, 12, 25, 70, 200, 3000, 9000, len(whole) - 1):
    cut.write_bytes(whole[:end])
    refused(cut, config, 'cut.gguf.*(is empty|whole|cut or damaged)')


def test_not_of_this_format(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  whole = pathlib.Path(file).read_bytes()
  other = tmp_path / 'other.gguf'
  for content, match in (
    (b'PK\3\4' + whole, 'no GGUF file'),
    (b'GGUF' + struct.pack('<I', 1) + whole[8:], 'version 1'),
    (b'GGUF' + struct.pack('>I', 3) + whole[8:], 'big-endian'),
  ):
    other.write_bytes(content)
    refused(other, config, match)
  refused(tmp_path / 'none.gguf', config, 'no folder or GGUF file')


def patched(file, out, **fields):
  """The file with other values; `architecture` for the keys' prefix."""
  header = gguf.GGUFReader(file)
  architecture = fields.pop('architecture', 'gemma3')
  new = gguf.GGUFWriter(str(out), architecture)
  for key, field in header.fields.items():
    if key.startswith('GGUF.') or key == 'general.architecture':
      continue
    value = fields.pop(key, field.contents())
    if value is not None:
      new.add_key_value(
        key, value, field.types[0],
        field.types[-1] if len(field.types) > 1 else None,
      )  # fmt: skip
  for key, value in fields.items():
    kind = gguf.GGUFValueType.get_type(value)
    new.add_key_value(key, value, kind)
  for x in header.tensors:
    new.add_tensor(x.name, x.data, raw_dtype=x.tensor_type)
  new.write_header_to_file()
  new.write_kv_data_to_file()
  new.write_tensors_to_file()
  new.close()
  return out


@pytest.mark.parametrize(
  'fields, match',
  [
    ({'architecture': 'llama'}, "architecture 'llama'.*gemma3"),
    ({'gemma3.block_count': None}, 'num_hidden_layers'),
    ({'gemma3.attention.layer_norm_rms_epsilon': 1e-5}, 'rms_norm_eps'),
    ({'gemma3.attention.value_length': 8}, 'value_length'),
    ({'gemma3.attention.scale': 0.5}, 'attention.scale'),
    ({'gemma3.rope.scaling.type': 'yarn'}, 'yarn'),
    ({'gemma3.attn_logit_softcapping': 50.0}, 'attn_logit_softcapping'),
    ({'gemma3.attention.sliding_window_pattern': 2}, 'kinds'),
    ({'gemma3.rope.freq_base_swa': 1e4}, 'local_rope_base'),
    ({'split.count': 3}, 'merge'),
  ],
)
def test_settings_of_another_model(tmp_path, vocabulary, fields, match):
  config = families(vocabulary[1])['gemma3']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  refused(patched(file, tmp_path / 'x.gguf', **fields), config, match)


def test_what_llama_cpp_takes_for_granted(tmp_path, vocabulary):
  """Older converters leave out what later ones write."""
  config = dataclasses.replace(
    families(vocabulary[1])['gemma3'], layers=6, local_rope_base=1e4,
    pattern=('local',) * 5 + ('global',),
  )  # fmt: skip
  file, _ = made(config, tmp_path / 'out', vocabulary)
  none = dict.fromkeys(('gemma3.attention.sliding_window_pattern',
                        'gemma3.rope.freq_base_swa'))  # fmt: skip
  old = patched(file, tmp_path / 'old.gguf', **none)
  official.load(str(old), config, like_of(config, mesh_of(1, 1)))
  none = {'gemma3.attention.sliding_window': None}
  no_window = patched(file, tmp_path / 'no_window.gguf', **none)
  refused(no_window, config, 'kinds: found (global ?)+,')


@pytest.mark.parametrize(
  'fields, match',
  [
    ({'tokenizer.ggml.model': 'gpt2'}, "kind 'gpt2'.*tokenizer.path"),
    ({'tokenizer.ggml.scores': None}, 'scores'),
    ({'tokenizer.ggml.tokens': ['a', 'b']}, '2 pieces'),
  ],
)
def test_another_tokenizer(tmp_path, vocabulary, fields, match):
  config = families(vocabulary[1])['gemma3']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  with pytest.raises(UserError, match=match) as e:
    tokenizer_lib.load(str(patched(file, tmp_path / 'x.gguf', **fields)))
  assert '\n' not in str(e.value)


def test_a_number_that_is_no_quantisation(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  header = gguf_file.read(file)
  name = 'blk.0.ffn_up.weight'
  whole = bytearray(pathlib.Path(file).read_bytes())
  at = whole.index(name.encode()) + len(name) + 4 + 16  # after its two sizes
  assert struct.unpack_from('<I', whole, at)[0] == header.tensors[name].kind
  for kind, match in (99, 'quantised as 99'), (24, 'quantised as 24'):
    struct.pack_into('<I', whole, at, kind)  # 24: whole numbers
    (tmp_path / 'x.gguf').write_bytes(whole)
    refused(tmp_path / 'x.gguf', config, f'ffn_up.*{match}')


def test_other_tensors(tmp_path, vocabulary):
  config = families(vocabulary[1])['gemma']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  whole = pathlib.Path(file).read_bytes()
  other = tmp_path / 'x.gguf'
  other.write_bytes(whole.replace(b'blk.0.ffn_up', b'blk.0.ffn_ux'))
  refused(other, config, 'ffn_up.weight: found absent(.|\n)*ffn_ux')
  more = dataclasses.replace(config, used_vocab=None)
  refused(file, more, 'vocabulary of the config')


def test_without_the_package(tmp_path, vocabulary, monkeypatch):
  config = families(vocabulary[1])['gemma']
  file, _ = made(config, tmp_path / 'out', vocabulary)
  monkeypatch.setitem(sys.modules, 'gguf', None)
  refused(file, config, 'pip install gguf')
  assert tokenizer_lib.load(file).vocab_size == vocabulary[1]
  with pytest.raises(UserError, match='pip install gguf'):
    made(config, tmp_path / 'again', vocabulary)
  assert not (tmp_path / 'again').exists()


@pytest.mark.parametrize(
  'family, change, match',
  [
    ('gemma3', dict(layers=4, pattern=('global', 'local')), 'pattern'),
    ('gemma3', dict(final_softcap=30.0), 'final_softcap'),
    ('gemma3', dict(query_scale=0.5), 'query_scale'),
    ('gemma2', dict(pattern=('global',)), 'pattern'),
    ('gemma2', dict(attention_softcap=None), 'attention_softcap'),
    ('gemma2', dict(final_softcap=None), 'final_softcap'),
  ],
)
def test_what_llama_cpp_computes_otherwise(
  tmp_path, vocabulary, family, change, match
):
  config = families(vocabulary[1])[family]
  config = dataclasses.replace(config, **change)
  with pytest.raises(UserError, match=f'no key for {match}'):
    made(config, tmp_path / 'out', vocabulary)
  assert not (tmp_path / 'out').exists()


RELEASES = [name for name in configs.CONFIGS if 'tiny' not in name]


@pytest.mark.parametrize('name', RELEASES)
def test_the_releases_can_be_written(name):
  config = configs.CONFIGS[name]
  raw = config_json.to_json(config, 'float32')
  writer._check(config, raw, raw['model_type'].removesuffix('_text'))
