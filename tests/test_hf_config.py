"""What a Hugging Face folder says of a model beside its weights."""

import dataclasses
import io
import json
import os

from folders import change, CONFIGS, exported, read
import pytest
import sentencepiece
import toy

from bond_jax import hf, hf_config, hf_export, tokenizer
from bond_jax.errors import UserError
from bond_jax.models import gemma_configs

# -- config.json


@pytest.mark.parametrize('name', gemma_configs.CONFIGS)
def test_every_model_knows_itself_again(tmp_path, name):
  config = gemma_configs.CONFIGS[name]
  raw = hf_config.to_json(config, 'bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(raw))
  assert hf.config_of(str(tmp_path)) == config


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
  assert hf.config_of(str(tmp_path)) == gemma_configs.CONFIGS[name]


@pytest.mark.parametrize(
  'values, why',
  [
    (dict(architectures=['LlamaForCausalLM']), 'architecture LlamaForCausalLM'),
    (dict(architectures=None), 'architecture none'),
    (dict(hidden_activation='relu'), "activation is 'relu'"),
    (dict(rms_norm_eps=1e-5), 'rms_norm_eps is 1e-05'),
    (dict(attention_bias=True), 'attention_bias is True'),
    (dict(use_bidirectional_attention=True), 'bidirectional'),
    (dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping is 50.0'),
    (dict(quantization_config={'bits': 4}), 'quantization_config'),
    (dict(rope_scaling=dict(rope_type='yarn')), "rope_type is 'yarn'"),
    (dict(layer_types=['full_attention'] * 4), 'layer_types has 4 entries'),
  ],
)
def test_what_we_do_not_compute_is_refused(tmp_path, values, why):
  raw = hf_config.to_json(CONFIGS['gemma3'], 'float32')
  (tmp_path / 'config.json').write_text(json.dumps({**raw, **values}))
  with pytest.raises(UserError, match=why) as e:
    hf.config_of(str(tmp_path))
  assert '\n' not in str(e.value)


@pytest.mark.parametrize(
  'sizes, why',
  [
    (dict(query_scale=0.4), r'query_scale is 0.4'),
    (dict(attention_softcap=5.0, qk_norm=True), 'mix the families'),
    (dict(qk_norm=True, post_norms=False), 'mix the families'),
    (dict(global_rope_base=1e6), 'mix the families'),
  ],
)
def test_what_they_cannot_compute_is_refused(tmp_path, sizes, why):
  config = dataclasses.replace(CONFIGS['gemma2'], **sizes)
  with pytest.raises(UserError, match=why):
    hf_export.export({}, config, str(tmp_path / 'x'), dtype='float32')
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


def test_a_source_without_a_sentencepiece_model(tmp_path):
  exported('gemma3', tmp_path / 'a')
  change(tmp_path / 'a', 'generation_config.json', eos_token_id=[1, 106])
  exported('gemma3', tmp_path / 'b', source=str(tmp_path / 'a'))
  said = read(tmp_path / 'b', 'generation_config.json')
  assert said['eos_token_id'] == [1, 106]


@pytest.mark.parametrize(
  'values',
  [
    dict(hidden_size='1152'),
    dict(num_hidden_layers=10**18),
    dict(num_hidden_layers=0),
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
    dict(rope_parameters=3),
    dict(rope_parameters={'full_attention': 'x'}),
    dict(rope_scaling={'rope_type': ['linear']}),
    dict(rope_scaling={'rope_type': 'linear', 'factor': 'x'}),
    dict(rope_theta=10**400),
    dict(architectures=['Gemma3ForConditionalGeneration'], text_config=[3]),
    dict(
      architectures=['Gemma3ForConditionalGeneration'],
      text_config={'hidden_size': 'x'},
    ),
  ],
)
def test_values_of_another_kind_are_one_line(values):
  raw = hf_config.to_json(gemma_configs.CONFIGS['gemma3_1b'], 'float32')
  with pytest.raises(UserError, match='F/config.json|F holds') as e:
    hf_config.from_json({**raw, **values}, 'F')
  assert '\n' not in str(e.value)
