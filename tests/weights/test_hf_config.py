"""What a Hugging Face folder says of a model beside its weights."""

import dataclasses
import io
import json
import os

from folders import config_of, CONFIGS, exported, read
import pytest
import sentencepiece
import toy

from bond_jax.data import tokenizer
from bond_jax.errors import UserError
from bond_jax.models.gemma import configs
from bond_jax.weights.huggingface import config_json, writer

# -- config.json


@pytest.mark.parametrize('name', configs.CONFIGS)
def test_every_model_knows_itself_again(tmp_path, name):
  config = configs.CONFIGS[name]
  raw = config_json.to_json(config, 'bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  assert config_of(tmp_path) == config


# What the releases say of themselves, in the words that they leave out too.
RELEASED = {
  'gemma_2b': dict(
    architectures=['GemmaForCausalLM'], model_type='gemma', head_dim=256,
    hidden_act='gelu', hidden_activation=None, hidden_size=2048,
    intermediate_size=16384, num_attention_heads=8, num_hidden_layers=18,
    num_key_value_heads=1, rms_norm_eps=1e-06, rope_theta=10000.0,
    vocab_size=256000, max_position_embeddings=8192,
  ),
  'gemma2_27b': dict(
    architectures=['Gemma2ForCausalLM'], model_type='gemma2', head_dim=128,
    hidden_act='gelu_pytorch_tanh', hidden_activation='gelu_pytorch_tanh',
    hidden_size=4608, intermediate_size=36864, num_attention_heads=32,
    num_hidden_layers=46, num_key_value_heads=16, query_pre_attn_scalar=144,
    sliding_window=4096, final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0, rope_theta=10000.0, vocab_size=256000,
  ),
  'gemma3_1b': dict(
    architectures=['Gemma3ForCausalLM'], model_type='gemma3_text',
    head_dim=256, hidden_size=1152, intermediate_size=6912,
    num_attention_heads=4, num_hidden_layers=26, num_key_value_heads=1,
    query_pre_attn_scalar=256, rope_local_base_freq=10000, rope_scaling=None,
    rope_theta=1000000, sliding_window=512, sliding_window_pattern=6,
    attn_logit_softcapping=None, vocab_size=262144,
  ),
  'gemma3_4b': dict(
    architectures=['Gemma3ForConditionalGeneration'], model_type='gemma3',
    text_config=dict(
      hidden_size=2560, intermediate_size=10240, model_type='gemma3_text',
      num_hidden_layers=34, rope_scaling=dict(factor=8.0, rope_type='linear'),
      sliding_window=1024,
    ),
  ),
  'gemma3_270m': dict(
    architectures=['Gemma3ForCausalLM'], model_type='gemma3_text',
    head_dim=256, hidden_size=640, intermediate_size=2048,
    num_attention_heads=4, num_hidden_layers=18, num_key_value_heads=1,
    sliding_window=512, vocab_size=262144,
    layer_types=(['sliding_attention'] * 5 + ['full_attention']) * 3,
    rope_parameters=dict(
      full_attention=dict(rope_theta=1e6, rope_type='default'),
      sliding_attention=dict(rope_theta=1e4, rope_type='default'),
    ),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', RELEASED)
def test_released_configs_are_recognised(tmp_path, name):
  (tmp_path / 'config.json').write_text(json.dumps(RELEASED[name]))
  assert config_of(tmp_path) == configs.CONFIGS[name]


@pytest.mark.parametrize(
  'values, why',
  [
    (dict(architectures=['LlamaForCausalLM']), 'architecture LlamaForCausalLM'),
    (dict(architectures=None, model_type=None), 'architecture none'),
    (dict(model_type='llama'), 'model_type llama'),
    (dict(model_type='gemma2'), 'Gemma3ForCausalLM and model_type gemma2'),
    (dict(architectures=['Gemma2ForCausalLM']), 'and model_type gemma3_text'),
    (dict(per_layer_config={'0': {}}), 'per_layer_config is'),
    (dict(hidden_activation='relu'), "activation is 'relu'"),
    (dict(rms_norm_eps=1e-5), 'rms_norm_eps is 1e-05'),
    (dict(attention_bias=True), 'attention_bias is True'),
    (dict(use_bidirectional_attention=True), 'bidirectional'),
    (dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping is 50.0'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(rope_scaling=dict(rope_type='yarn')), "rope_type is 'yarn'"),
    (dict(layer_types=['full_attention'] * 4), 'layer_types has 4 entries'),
    (dict(layer_types=[]), 'layer_types has 0 entries'),
  ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, values, why):
  raw = config_json.to_json(CONFIGS['gemma3'], 'float32')
  (tmp_path / 'config.json').write_text(json.dumps({**raw, **values}))
  with pytest.raises(UserError, match=why) as e:
    config_of(tmp_path)
  assert '\n' not in str(e.value)


# -- Keys that say the same thing: those count that transformers reads

FULL, SLIDING = 'full_attention', 'sliding_attention'
LINEAR = dict(rope_type='linear', factor=8.0)


IMAGES = dict(
  architectures=['Gemma3ForConditionalGeneration'], model_type='gemma3'
)


def table(theta, **more):
  return {'rope_theta': theta, 'rope_type': 'default', **more}


# family, keys -> kinds of the layers, base and scale of full ones, base of
# sliding ones. tests/parity asks transformers for the same.
KEYS = {
  'none': ('gemma3_text', {}, ('LGLG', 1e6, 1, 1e4)),
  'flat': ('gemma3_text', dict(
    rope_parameters=table(1e6)), ('LGLG', 1e6, 1, 1e4)),
  'flat, another base': ('gemma3_text', dict(
    rope_parameters=table(5e5, **LINEAR)), ('LGLG', 1e6, 1, 1e4)),
  'flat, and old keys': ('gemma3_text', dict(
    rope_parameters=table(4e5), rope_theta=5e5, rope_local_base_freq=2e4,
  ), ('LGLG', 5e5, 1, 2e4)),
  'flat and nested': ('gemma3_text', dict(
    rope_parameters={'rope_theta': 4e5, FULL: LINEAR}, rope_theta=5e5,
  ), ('LGLG', 5e5, 8, 1e4)),
  'nested, and old keys': ('gemma3_text', dict(
    rope_parameters={FULL: table(5e5, **LINEAR), SLIDING: table(2e4)},
    rope_theta=7.0, rope_local_base_freq=9.0,
  ), ('LGLG', 5e5, 8, 2e4)),
  'nested for full layers': ('gemma3_text', dict(
    rope_parameters={FULL: table(5e5)}, rope_local_base_freq=3e4,
  ), ('LGLG', 5e5, 1, 3e4)),
  'nested for sliding layers': ('gemma3_text', dict(
    rope_parameters={SLIDING: table(3e4)}, rope_theta=5e5,
  ), ('LGLG', 5e5, 1, 3e4)),
  'nested without bases': ('gemma3_text', dict(
    rope_parameters={FULL: LINEAR, SLIDING: {}}, rope_theta=5e5,
    rope_local_base_freq=3e4,
  ), ('LGLG', 5e5, 8, 3e4)),
  'nested, and null': ('gemma3_text', dict(
    rope_parameters={FULL: None, SLIDING: None}, rope_theta=5e5,
  ), ('LGLG', 5e5, 1, 1e4)),
  'nested, and a scale': ('gemma3_text', dict(
    rope_parameters={FULL: table(5e5), SLIDING: table(2e4)},
    rope_scaling=LINEAR,
  ), ('LGLG', 5e5, 8, 2e4)),
  'nested, and a base': ('gemma3_text', dict(
    rope_parameters={FULL: table(5e5)}, rope_scaling=table(7e5),
  ), ('LGLG', 7e5, 1, 1e4)),
  'old keys': ('gemma3_text', dict(
    rope_theta=5e5, rope_local_base_freq=2e4, rope_scaling=LINEAR,
  ), ('LGLG', 5e5, 8, 2e4)),
  'a factor of no scale': ('gemma3_text', dict(
    rope_parameters={FULL: table(5e5, factor=8.0)}), ('LGLG', 5e5, 1, 1e4)),
  'layers by name': ('gemma3_text', dict(
    layer_types=[FULL, SLIDING, SLIDING, FULL], sliding_window_pattern=3,
  ), ('GLLG', 1e6, 1, 1e4)),
  'layers by name, and null': ('gemma3_text', dict(
    layer_types=[FULL, SLIDING, SLIDING, FULL], sliding_window_pattern=None,
  ), ('GLLG', 1e6, 1, 1e4)),
  'layers by number': ('gemma3_text', dict(
    layer_types=None, sliding_window_pattern=3, _sliding_window_pattern=2,
  ), ('LLGL', 1e6, 1, 1e4)),
  'gemma2, flat': ('gemma2', dict(
    rope_parameters=table(5e5), rope_theta=3e5), ('LGLG', 5e5, 1, 5e5)),
  'gemma2, without a base': ('gemma2', dict(
    rope_parameters=dict(rope_type='default'), rope_theta=3e5,
  ), ('LGLG', 3e5, 1, 3e5)),
  'gemma2, twice': ('gemma2', dict(
    rope_parameters=table(5e5), rope_scaling=dict(rope_type='default'),
    rope_theta=3e5,
  ), ('LGLG', 3e5, 1, 3e5)),
  'gemma2, a number': ('gemma2', dict(
    sliding_window_pattern=4), ('LGLG', 1e4, 1, 1e4)),
  'gemma2, by name': ('gemma2', dict(
    layer_types=[FULL, SLIDING, SLIDING, FULL], sliding_window_pattern=4,
  ), ('GLLG', 1e4, 1, 1e4)),
  'gemma, twice': ('gemma', dict(
    rope_parameters=table(5e5), rope_scaling=LINEAR, rope_theta=3e5,
  ), ('GGGG', 3e5, 8, 3e5)),
  'gemma, an old name': ('gemma', dict(
    rope_scaling=dict(type='linear', factor=8.0)), ('GGGG', 1e4, 8, 1e4)),
}  # fmt: skip


def described(family, keys):
  """A config.json of four layers."""
  return {
    'model_type': family,
    'architectures': [config_json.ARCHITECTURES[family]],
    'hidden_size': 32, 'num_hidden_layers': 4, 'num_attention_heads': 4,
    'num_key_value_heads': 2, 'head_dim': 8, 'intermediate_size': 48,
    'vocab_size': 64, 'sliding_window_pattern': 2, **keys,
  }  # fmt: skip


@pytest.mark.parametrize(
  'name, images',
  [
    *((name, False) for name in KEYS),
    *((name, True) for name, row in KEYS.items() if row[0] == 'gemma3_text'),
  ],
)
def test_keys_that_say_the_same_thing(name, images):
  """Beside an image encoder those of the text alone, not those around it."""
  family, keys, expected = KEYS[name]
  raw = described(family, keys)
  if images:
    around = dict(rope_theta=3.0, sliding_window_pattern=1, hidden_size=8)
    raw = {**around, **IMAGES, 'text_config': raw}
  c = config_json.from_json(raw, 'F/config.json')
  kinds = ''.join({'local': 'L'}.get(k, 'G') for k in configs.kinds(c))
  found = kinds, c.global_rope_base, c.global_rope_scale, c.local_rope_base
  assert found == expected


@pytest.mark.parametrize(
  'family, keys, why',
  [
    # Versions of transformers differ, or fail, or we compute something else.
    ('gemma3_text', dict(rope_scaling=dict(type='linear', factor=8.0)), 'type'),
    ('gemma3_text', dict(rope_parameters={SLIDING: LINEAR}), 'sliding layers'),
    ('gemma3_text', dict(rope_scaling=dict(rope_type='linear')), 'factor None'),
    ('gemma3_text', dict(rope_theta=None), 'rope_theta is None'),
    ('gemma3_text', dict(rope_local_base_freq=None), 'rope_theta is None'),
    (
      'gemma3_text',
      dict(rope_parameters=table(5e5), rope_scaling=LINEAR),
      'cannot read these rope_parameters .rope_theta',
    ),
    ('gemma2', dict(rope_parameters={FULL: table(5e5)}), 'positions has full'),
    ('gemma', dict(rope_parameters={FULL: table(5e5)}), 'positions has full'),
    ('gemma2', dict(rope_scaling=LINEAR), 'positions of sliding layers by 8'),
  ],
)
def test_keys_that_cannot_be_read_alike_are_refused(family, keys, why):
  with pytest.raises(UserError, match=why) as e:
    config_json.from_json(described(family, keys), 'F/config.json')
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'sizes, why',
  [
    (dict(query_scale=0.4), r'query_scale 1 / sqrt.n. of a whole n'),
    (dict(attention_softcap=5.0, qk_norm=True), 'mix the families'),
    (dict(qk_norm=True, post_norms=False), 'mix the families'),
    (dict(global_rope_base=1e6), 'mix the families'),
  ],
)
def test_what_they_cannot_compute_is_refused(tmp_path, sizes, why):
  config = dataclasses.replace(CONFIGS['gemma2'], **sizes)
  with pytest.raises(UserError, match=why):
    writer.export({}, config, str(tmp_path / 'x'), dtype='float32')
  assert not os.listdir(tmp_path)


# -- Tokenizers


def tokenizer_file(folder, *symbols):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(['the film was good', 'the film was bad'] * 9),
    model_writer=model, model_type='bpe', vocab_size=40, pad_id=0, eos_id=1,
    num_threads=1,
    bos_id=2, unk_id=3, minloglevel=2, user_defined_symbols=[*symbols],
    hard_vocab_limit=False,
  )  # fmt: skip
  path = folder / 'spm.model'
  path.write_bytes(model.getvalue())
  return str(path)


def test_completions_end_where_the_vocabulary_says(tmp_path):
  turns = tokenizer_file(tmp_path, '<one>', *tokenizer.TURNS[0])
  exported('gemma3', tmp_path / 'x', tokenizer_path=turns, temperature=0.7)
  said = read(tmp_path / 'x', 'generation_config.json')
  assert said['eos_token_id'] == [1, 6]
  assert read(tmp_path / 'x')['eos_token_id'] == [1, 6]
  assert (said['temperature'], said['top_k'], said['top_p']) == (0.7, 0, 1.0)
  assert said['do_sample'] is True
  described = read(tmp_path / 'x', 'tokenizer_config.json')
  assert described['tokenizer_class'] == 'GemmaTokenizer'
  assert 'start_of_turn' in described['chat_template']
  with open(turns, 'rb') as f:
    assert (tmp_path / 'x' / 'tokenizer.model').read_bytes() == f.read()


def test_tokenizer_files_come_from_the_source(tmp_path):
  plain = tokenizer_file(tmp_path)
  exported('gemma3', tmp_path / 'a', tokenizer_path=plain)
  (tmp_path / 'a' / 'tokenizer.json').write_text('{"as": "it is"}')
  exported('gemma3', tmp_path / 'b', source=str(tmp_path / 'a'))
  exported(
    'gemma3', tmp_path / 'c', source=str(tmp_path / 'a'), tokenizer_path=plain
  )
  a, b, c = (toy.listing(tmp_path / x) for x in 'abc')
  assert a == b == c
  assert 'chat_template' not in read(tmp_path / 'a', 'tokenizer_config.json')
  other = tokenizer_file(tmp_path, tokenizer.TURNS[0][0])
  with pytest.raises(UserError, match='is not the tokenizer of'):
    exported(
      'gemma3', tmp_path / 'd', source=str(tmp_path / 'a'), tokenizer_path=other
    )
  assert not (tmp_path / 'd').exists()


@pytest.mark.parametrize(
  'values',
  [
    dict(hidden_size='1152'),
    dict(num_hidden_layers=10**18),
    dict(num_hidden_layers=0),
    dict(hidden_size=0),
    dict(head_dim=-256),
    dict(num_key_value_heads=3),
    dict(vocab_size=None),
    dict(head_dim=True * 0.5),
    dict(rms_norm_eps='x'),
    dict(rms_norm_eps=None),
    dict(query_pre_attn_scalar=-1),
    dict(final_logit_softcapping=[30]),
    dict(sliding_window_pattern=0, layer_types=None),
    dict(sliding_window=None),
    dict(layer_types=['full_attention', 3]),
    dict(layer_types={'a': 1}),
    dict(architectures='Gemma3ForCausalLM'),
    dict(architectures=[['Gemma3ForCausalLM']]),
    dict(model_type=['gemma3_text']),
    dict(rope_parameters=3),
    dict(rope_parameters={'full_attention': 'x'}),
    dict(rope_scaling={'rope_type': ['linear']}),
    dict(rope_scaling={'rope_type': 'linear', 'factor': 'x'}),
    dict(rope_scaling={'rope_type': 'linear', 'factor': 0}),
    dict(rope_theta=10**400),
    dict(IMAGES, text_config=[3]),
    dict(IMAGES, text_config={'hidden_size': 'x'}),
    dict(IMAGES, quantization_config={'bits': 4}),
  ],
)
def test_values_of_another_kind_are_one_line(values):
  raw = config_json.to_json(configs.CONFIGS['gemma3_1b'], 'float32')
  with pytest.raises(UserError, match='F/config.json|F holds') as e:
    config_json.from_json({**raw, **values}, 'F/config.json')
  assert '\n' not in str(e.value)
