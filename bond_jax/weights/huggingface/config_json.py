"""Hugging Face's config.json of Gemma 1, 2 and 3, from our Config and back.

What would change the numbers and is not in a Config is refused, not ignored.
"""

from __future__ import annotations

import math
from typing import Any

from bond_jax.errors import UserError
from bond_jax.models.gemma import configs
from bond_jax.models.gemma import model as gemma

# model_type -> class. Of the last, which sees images too, we take the text.
ARCHITECTURES = {
  'gemma': 'GemmaForCausalLM',
  'gemma2': 'Gemma2ForCausalLM',
  'gemma3_text': 'Gemma3ForCausalLM',
  'gemma3': 'Gemma3ForConditionalGeneration',
}

_KINDS = {'sliding_attention': 'local', 'full_attention': 'global'}
_GELU = 'gelu_pytorch_tanh'

# What a config.json means by what it leaves out.
_COMMON = dict(
  head_dim=256,
  hidden_act=_GELU,
  hidden_activation=_GELU,
  rms_norm_eps=1e-6,
  tie_word_embeddings=True,
  attention_bias=False,
  use_bidirectional_attention=None,
  quantization_config=None,
  layer_types=None,
  query_pre_attn_scalar=None,
  attn_logit_softcapping=None,
  final_logit_softcapping=None,
)
_DEFAULTS = {
    'gemma': dict(
        _COMMON, vocab_size=256_000, hidden_size=3072, num_hidden_layers=28,
        intermediate_size=24_576, num_attention_heads=16,
        num_key_value_heads=16,
    ),
    'gemma2': dict(
        _COMMON, vocab_size=256_000, hidden_size=2304, num_hidden_layers=26,
        intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
        query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_pattern=2, attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
    'gemma3_text': dict(
        _COMMON, vocab_size=262_208, hidden_size=2304, num_hidden_layers=26,
        intermediate_size=9216, num_attention_heads=8, num_key_value_heads=4,
        query_pre_attn_scalar=256, sliding_window=4096,
        sliding_window_pattern=6,
    ),
}  # fmt: skip


def family(config: gemma.Config) -> str:
  """The model_type that computes what the config says; a UserError if none."""
  c, kinds = config, set(configs.kinds(config))
  plain_rope = (
    c.local_rope_base == c.global_rope_base and c.global_rope_scale == 1
  )
  if c.qk_norm and c.post_norms and not c.attention_softcap:
    return 'gemma3_text'
  if c.post_norms and not c.qk_norm and plain_rope:
    return 'gemma2'
  own_scale = c.query_scale or c.head_size**-0.5
  if (
    not (c.post_norms or c.qk_norm or c.attention_softcap or c.final_softcap)
    and kinds == {'global'}
    and c.global_rope_scale == 1
    and math.isclose(own_scale, c.head_size**-0.5)
  ):
    return 'gemma'
  raise UserError(
    'these model.sizes mix the families of Gemma, and Hugging Face has no class'
    ' for that; keep those of one family, or export with --format=official.'
  )


def to_json(config: gemma.Config, dtype: str) -> dict[str, Any]:
  """The config.json of a model, in the keys that old and new readers know."""
  kind = family(config)
  c = config
  out = {
    'architectures': [ARCHITECTURES[kind]],
    'model_type': kind,
    'torch_dtype': dtype,
    'vocab_size': vocab_rows(c),
    'hidden_size': c.features,
    'intermediate_size': c.feed_forward,
    'num_hidden_layers': c.layers,
    'num_attention_heads': c.heads,
    'num_key_value_heads': c.kv_heads,
    'head_dim': c.head_size,
    'hidden_activation': _GELU,
    'rms_norm_eps': 1e-6,
    'rope_theta': c.global_rope_base,
    'max_position_embeddings': 8192,
    'attention_bias': False,
    'attention_dropout': 0.0,
    'initializer_range': 0.02,
    'tie_word_embeddings': True,
    'use_cache': True,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'bos_token_id': 2,
  }
  if kind == 'gemma':
    return {**out, 'hidden_act': _GELU}
  scalar = round((c.query_scale or c.head_size**-0.5) ** -2)
  if c.query_scale and not math.isclose(scalar**-0.5, c.query_scale):
    raise UserError(
      f'Hugging Face writes query_scale as the root of a whole number, 1 /'
      f' sqrt(n); model.sizes.query_scale is {c.query_scale}.'
    )
  names = {ours: theirs for theirs, ours in _KINDS.items()}
  out |= {
    'query_pre_attn_scalar': scalar,
    'sliding_window': c.window,
    'layer_types': [names[kind] for kind in configs.kinds(c)],
    'attn_logit_softcapping': c.attention_softcap,
    'final_logit_softcapping': c.final_softcap,
  }
  if kind == 'gemma3_text':
    long = c.global_rope_scale != 1
    linear = {'rope_type': 'linear', 'factor': c.global_rope_scale}
    out |= {
      'rope_local_base_freq': c.local_rope_base,
      'rope_scaling': linear if long else None,
      'max_position_embeddings': 131_072 if long else 32_768,
    }
    pattern = len(c.pattern)
    if c.pattern == ('local',) * (pattern - 1) + ('global',):
      out['sliding_window_pattern'] = pattern  # readers without layer_types
  return out


_SIZES = ('vocab_size', 'hidden_size', 'num_hidden_layers',
          'num_attention_heads', 'num_key_value_heads', 'head_dim',
          'intermediate_size')  # fmt: skip
_MOST = dict.fromkeys(_SIZES, 2**31) | {'num_hidden_layers': 1000}


def from_json(raw: dict[str, Any], path: str) -> gemma.Config:
  """The model of a config.json; a UserError if we do not compute that."""
  _check_kinds(raw, path)
  kind = _model_type(raw, path)
  if kind == 'gemma3':
    whole = {'quantization_config': raw.get('quantization_config')}
    raw, kind = {**(raw.get('text_config') or {}), **whole}, 'gemma3_text'
    _check_kinds(raw, path)
  raw = {**_DEFAULTS[kind], **raw}
  if kind == 'gemma2' or raw['layer_types'] is not None:
    raw['sliding_window_pattern'] = 2  # theirs, or not read
  _check_sizes(raw, path)
  _refuse(raw, kind, path)
  new = kind != 'gemma'
  pattern = _pattern(raw, path) if new else ('global',)
  (theta, factor), (local, local_factor) = _ropes(raw, kind, path)
  if local_factor != 1 and 'local' in pattern:
    raise UserError(
      f'{path}/config.json scales the positions of sliding layers by'
      f' {local_factor:g}; readable is a scale in full layers alone.'
    )
  scalar = raw['query_pre_attn_scalar'] or raw['head_dim']
  config = gemma.Config(
    vocab_size=raw['vocab_size'],
    features=raw['hidden_size'],
    layers=raw['num_hidden_layers'],
    heads=raw['num_attention_heads'],
    kv_heads=raw['num_key_value_heads'],
    head_size=raw['head_dim'],
    feed_forward=raw['intermediate_size'],
    pattern=pattern,
    window=raw['sliding_window'] if new else 0,
    qk_norm=kind == 'gemma3_text',
    post_norms=new,
    query_scale=None if scalar == raw['head_dim'] else scalar**-0.5,
    attention_softcap=raw['attn_logit_softcapping'],
    final_softcap=raw['final_logit_softcapping'],
    local_rope_base=local,
    global_rope_base=theta,
    global_rope_scale=factor,
    gating_transposed=new,
  )
  name = known_as(config)
  return gemma.CONFIGS[name] if name else config


def _check_kinds(raw: dict[str, Any], path: str) -> None:
  """Refuses values that are not of the kind that their names promise."""
  is_number = lambda x: isinstance(x, int | float) and 0 < x < 1e30
  is_texts = lambda x: (
    isinstance(x, list) and all(isinstance(y, str) for y in x)
  )
  is_table = lambda x: isinstance(x, dict)
  kinds = {
    'a positive number': (is_number, (
      'query_pre_attn_scalar', 'attn_logit_softcapping', 'rms_norm_eps',
      'final_logit_softcapping', 'rope_theta', 'rope_local_base_freq',
      'sliding_window', 'factor')),
    'a name': (lambda x: isinstance(x, str), ('model_type',)),
    'a list of names': (is_texts, ('architectures', 'layer_types')),
    'an object': (is_table, (
      'text_config', 'rope_parameters', 'rope_scaling', *_KINDS)),
  }  # fmt: skip
  for expected, (good, names) in kinds.items():
    for name in names:
      if raw.get(name) is not None and not good(raw[name]):
        raise UserError(
          f'{path}/config.json: {name} is {raw[name]!r:.60}, expected'
          f' {expected}; download it again.'
        )
  for name in ('rope_parameters', 'rope_scaling', *_KINDS):
    if raw.get(name):
      _check_kinds(raw[name], path)


def _check_sizes(raw: dict[str, Any], path: str) -> None:
  for name in (*_SIZES, 'sliding_window_pattern', 'sliding_window'):
    value, most = raw.get(name, 1), _MOST.get(name, 2**31)
    if not isinstance(value, int) or not 1 <= value <= most:
      raise UserError(
        f'{path}/config.json: {name} is {value!r:.60}, expected a whole number'
        f' from 1 to {most}; download it again.'
      )
  if raw['num_attention_heads'] % raw['num_key_value_heads']:
    raise UserError(
      f'{path}/config.json: num_attention_heads'
      f' ({raw["num_attention_heads"]}) is no multiple of num_key_value_heads'
      f' ({raw["num_key_value_heads"]}); download it again.'
    )
  if raw.get('rms_norm_eps') is None:
    raise UserError(f'{path}/config.json: rms_norm_eps is null, not 1e-6.')


def _model_type(raw: dict[str, Any], path: str) -> str:
  """By the key model_type, as transformers goes; one that all keys bear out."""
  names = {v: k for k, v in ARCHITECTURES.items()}
  found = (raw.get('architectures') or [None])[0]
  kind = raw.get('model_type') or names.get(found)
  if kind not in ARCHITECTURES or found not in (None, ARCHITECTURES[kind]):
    raise UserError(
      f'{path} holds a model of architecture {found or "none"} and model_type'
      f' {raw.get("model_type", "none")}; readable are'
      f' {", ".join(f"{k} of {v}" for k, v in names.items())}.'
    )
  return kind


def _refuse(raw: dict[str, Any], kind: str, path: str) -> None:
  """What would change the numbers, and which our model does not do."""
  activation = raw['hidden_act' if kind == 'gemma' else 'hidden_activation']
  wrong = {
    # 'gelu' in the first configs of Gemma 1 meant this one.
    'activation': activation not in (_GELU, *['gelu'] * (kind == 'gemma')),
    'rms_norm_eps': not math.isclose(raw['rms_norm_eps'], 1e-6),
    'attention_bias': raw['attention_bias'],
    'use_bidirectional_attention': raw['use_bidirectional_attention'],
    'attn_logit_softcapping': kind == 'gemma3_text'
    and raw['attn_logit_softcapping'],
    'quantization_config': raw['quantization_config'],
    'per_layer_config': raw.get('per_layer_config'),
  }
  for key, bad in wrong.items():
    if bad:
      raise UserError(
        f'{path}/config.json: {key} is {raw.get(key, activation)!r}, not what'
        ' the releases of Gemma have; such a model cannot be loaded.'
      )


def _ropes(
  raw: dict[str, Any], kind: str, path: str
) -> tuple[tuple[float, float], tuple[float, float]]:
  """(base, scale) of the positions in full layers, and in sliding ones.

  Of keys that say the same thing those count that transformers reads. Gemma 3
  has a table for each kind of layers: keys that lie flat in rope_parameters
  are not read, and rope_scaling is laid over the full layers. Before it there
  is one table: rope_scaling, else rope_parameters.
  """
  new, old = raw.get('rope_parameters') or {}, raw.get('rope_scaling') or {}
  full, sliding = new.get('full_attention'), new.get('sliding_attention')
  if kind == 'gemma3_text':
    fits = full or not old or raw.get('rope_parameters') is None
    full = {**(full or {'rope_type': 'default'}), **old}
    local = raw.get('rope_local_base_freq', 10_000.0)
    base = raw.get('rope_theta', 1_000_000.0)
  else:
    fits = not (_KINDS.keys() & {*new, *old})
    full = sliding = old or new
    base = local = raw.get('rope_theta', 10_000.0)
  if not fits:
    raise UserError(
      f'{path}/config.json: transformers cannot read these rope_parameters'
      f' ({", ".join(new) or "none"}) and rope_scaling ({", ".join(old)}) in a'
      f' {kind}; download it again.'
    )
  return _rope(full, base, path), _rope(sliding or {}, local, path)


def _rope(
  rope: dict[str, Any], base: float | None, path: str
) -> tuple[float, float]:
  """Base and scale of one table; `base` is what lies outside of it."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  if kind not in ('default', 'linear') or rope.get('type', kind) != kind:
    raise UserError(
      f'{path}/config.json: rope_type is {kind!r:.60}, and type'
      f' {rope.get("type", kind)!r:.60}; readable are default and linear, the'
      ' same in both.'
    )
  theta = rope.get('rope_theta', base)
  factor = rope.get('factor') if kind == 'linear' else 1
  if theta is None or factor is None:
    raise UserError(
      f'{path}/config.json: rope_theta is {theta} and factor {factor}; neither'
      ' may be null or absent; download it again.'
    )
  return float(theta), float(factor)


def _pattern(raw: dict[str, Any], path: str) -> tuple[str, ...]:
  """The shortest pattern that repeats into the kinds of the layers."""
  layers, period = raw['num_hidden_layers'], raw['sliding_window_pattern']
  types = raw['layer_types']
  if types is None:
    types = [
      'sliding_attention' if (j + 1) % period else 'full_attention'
      for j in range(layers)
    ]
  if len(types) != layers or not set(types) <= set(_KINDS):
    raise UserError(
      f'{path}/config.json: layer_types has {len(types)} entries,'
      f' {", ".join(sorted(set(types)))}; it must have {layers}, of'
      f' {", ".join(_KINDS)}.'
    )
  kinds = [_KINDS[name] for name in types]
  for n in range(1, layers + 1):
    if all(kinds[j] == kinds[j % n] for j in range(layers)):
      break
  return tuple(kinds[:n])


def vocab_rows(config: gemma.Config) -> int:
  """Rows of the embedding there: those that the tokenizer uses."""
  return config.used_vocab or config.vocab_size


def essence(config: gemma.Config) -> dict[str, Any]:
  """What of a config decides on the numbers, the vocabulary's rows apart."""
  c, kinds = config, configs.kinds(config)
  local, whole = 'local' in kinds, 'global' in kinds
  return dict(
    features=c.features,
    layers=c.layers,
    heads=c.heads,
    kv_heads=c.kv_heads,
    head_size=c.head_size,
    feed_forward=c.feed_forward,
    kinds=' '.join(kinds),
    window=c.window if local else None,
    qk_norm=c.qk_norm,
    post_norms=c.post_norms,
    query_scale=float(f'{c.query_scale or c.head_size**-0.5:.6g}'),
    attention_softcap=c.attention_softcap,
    final_softcap=c.final_softcap,
    local_rope_base=c.local_rope_base if local else None,
    global_rope_base=c.global_rope_base if whole else None,
    global_rope_scale=c.global_rope_scale if whole else None,
  )


def known_as(config: gemma.Config) -> str | None:
  """The name under which models/gemma.py knows a model."""
  for name, sizes in gemma.CONFIGS.items():
    if essence(sizes) == essence(config):
      return name
  return None
