"""Hugging Face's config.json of Gemma 1, 2 and 3, from our Config and back.

What would change the numbers and is not in a Config is refused, not ignored.
"""

import dataclasses
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

# Sizes, our name -> the key.
_SIZES = dict(
  vocab_size='vocab_size', features='hidden_size', layers='num_hidden_layers',
  heads='num_attention_heads', kv_heads='num_key_value_heads',
  head_size='head_dim', feed_forward='intermediate_size',
)  # fmt: skip
_COUNTS = (*_SIZES.values(), 'sliding_window', 'sliding_window_pattern')
_NUMBERS = ('query_pre_attn_scalar', 'attn_logit_softcapping', 'rms_norm_eps',
            'final_logit_softcapping', 'rope_theta',
            'rope_local_base_freq')  # fmt: skip
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


def to_json(config: gemma.Config, dtype: str) -> dict[str, Any]:
  """The config.json of a model, in the keys that old and new readers know.

  A UserError for sizes that no family computes.
  """
  for family in _DEFAULTS:
    raw = _of_family(config, family, dtype)
    try:
      if essence(from_json(raw, '')) == essence(config):
        return raw
    except UserError:
      continue
  raise UserError(
    'these model.sizes mix the families of Gemma, and Hugging Face has no class'
    ' for that; keep those of one family (with query_scale 1 / sqrt(n) of a'
    ' whole n), or export with --format=official.'
  )


def _of_family(config: gemma.Config, family: str, dtype: str) -> dict[str, Any]:
  """A config.json with all that this family has a key for."""
  c = config
  out = {
    'architectures': [ARCHITECTURES[family]],
    'model_type': family,
    'torch_dtype': dtype,
    **{key: getattr(c, name) for name, key in _SIZES.items()},
    'vocab_size': vocab_rows(c),
    'hidden_activation': _GELU,
    'rms_norm_eps': 1e-6,
    'rope_theta': c.global_rope_base,
    'max_position_embeddings': 8192,
    'tie_word_embeddings': True,
    'pad_token_id': 0,
    'eos_token_id': 1,
    'bos_token_id': 2,
  }
  if family == 'gemma':
    return {**out, 'hidden_act': _GELU}
  names = {kind: name for name, kind in _KINDS.items()}
  out |= {
    'query_pre_attn_scalar': round(_query_scale(c) ** -2),
    'sliding_window': max(1, c.window),  # unused where no layer is local
    'layer_types': [names[kind] for kind in configs.kinds(c)],
    'attn_logit_softcapping': c.attention_softcap,
    'final_logit_softcapping': c.final_softcap,
  }
  if family == 'gemma3_text':
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


def from_json(raw: dict[str, Any], path: str) -> gemma.Config:
  """The model of the config.json at `path`; a UserError if it is not ours."""
  try:
    return _from_json(raw, path)
  except (TypeError, ValueError, AttributeError, ArithmeticError) as e:
    raise UserError(
      f'{path} has a value of another type than its name promises'
      f' ({e}); download it again.'
    ) from e


def _from_json(raw: dict[str, Any], path: str) -> gemma.Config:
  family = _model_type(raw, path)
  if family == 'gemma3':
    whole = {'quantization_config': raw.get('quantization_config')}
    raw = {**(raw.get('text_config') or {}), **whole}
    family = 'gemma3_text'
  raw = {**_DEFAULTS[family], **raw}
  if family == 'gemma2' or raw['layer_types'] is not None:
    raw['sliding_window_pattern'] = 2  # not read, or always 2
  _check_values(raw, path)
  _check_computed(raw, family, path)
  new = family != 'gemma'
  pattern = _pattern(raw, path) if new else ('global',)
  (theta, factor), (local, local_factor) = _ropes(raw, family, path)
  if local_factor != 1 and 'local' in pattern:
    raise UserError(
      f'{path} scales the positions of sliding layers by'
      f' {local_factor:g}; readable is a scale in full layers alone.'
    )
  scalar = raw['query_pre_attn_scalar'] or raw['head_dim']
  config = gemma.Config(
    **{name: raw[key] for name, key in _SIZES.items()},
    pattern=pattern,
    window=raw['sliding_window'] if new else 0,
    qk_norm=family == 'gemma3_text',
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


def _check_values(raw: dict[str, Any], path: str) -> None:
  """Refuses sizes and numbers that are none; of these sizes may not be null."""
  for name in (*_COUNTS, *_NUMBERS):
    value, whole = raw.get(name), name in _COUNTS
    most = 1000 if name == 'num_hidden_layers' else 2**31 if whole else 1e30
    kind = int if whole else int | float
    good = isinstance(value, kind) and 0 < value <= most
    if not good and (value is not None or (whole and name in raw)):
      raise UserError(
        f'{path}: {name} is {value!r:.60}, expected a positive'
        f' {"whole " * whole}number up to {most:g}; download it again.'
      )


def _model_type(raw: dict[str, Any], path: str) -> str:
  """The model_type; `architectures` must agree with it."""
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


def _check_computed(raw: dict[str, Any], family: str, path: str) -> None:
  """Refuses what changes the numbers and our model does not do."""
  activation = raw['hidden_act' if family == 'gemma' else 'hidden_activation']
  wrong = {
    # 'gelu' in the first configs of Gemma 1 meant this one.
    'activation': activation not in (_GELU, *['gelu'] * (family == 'gemma')),
    'rms_norm_eps': not math.isclose(raw['rms_norm_eps'] or 0, 1e-6),
    'num_key_value_heads': raw['num_attention_heads']
    % raw['num_key_value_heads'],
    'attention_bias': raw['attention_bias'],
    'use_bidirectional_attention': raw['use_bidirectional_attention'],
    'attn_logit_softcapping': family == 'gemma3_text'
    and raw['attn_logit_softcapping'],
    'quantization_config': raw['quantization_config'],
    'per_layer_config': raw.get('per_layer_config'),
  }
  for key, bad in wrong.items():
    if bad:
      raise UserError(
        f'{path}: {key} is {raw.get(key, activation)!r}, not what'
        ' the releases of Gemma have; such a model cannot be loaded.'
      )


def _ropes(
  raw: dict[str, Any], family: str, path: str
) -> tuple[tuple[float, float], tuple[float, float]]:
  """(base, scale) of the positions in full layers, and in sliding ones.

  The precedence of keys is that of transformers. Gemma 3 has a table for each
  kind of layer in rope_parameters (flat keys are not read), and rope_scaling
  goes over that of the full layers. Before it there is one table:
  rope_scaling, else rope_parameters.
  """
  new, old = raw.get('rope_parameters') or {}, raw.get('rope_scaling') or {}
  if family == 'gemma3_text':
    if old and new and not new.get('full_attention'):
      raise UserError(
        f'{path}: transformers cannot read these rope_parameters'
        f' ({", ".join(new)}) with rope_scaling; download it again.'
      )
    full = {'rope_type': 'default', **(new.get('full_attention') or {}), **old}
    sliding = new.get('sliding_attention') or {}
    local = raw.get('rope_local_base_freq', 10_000.0)
    base = raw.get('rope_theta', 1_000_000.0)
  else:
    full = sliding = old or new
    base = local = raw.get('rope_theta', 10_000.0)
  return _rope(full, base, path), _rope(sliding, local, path)


def _rope(
  rope: dict[str, Any], base: float | None, path: str
) -> tuple[float, float]:
  """Base and scale of one table; `base` is what lies outside of it."""
  kind = rope.get('rope_type', rope.get('type', 'default'))
  theta = rope.get('rope_theta', base)
  factor = rope.get('factor') if kind == 'linear' else 1
  if kind not in ('default', 'linear') or rope.get('type', kind) != kind:
    why = f'rope_type is {kind!r:.60}, and type {rope.get("type", kind)!r:.60}'
  elif not (theta or 0) > 0 or not (factor or 0) > 0:
    why = f'rope_theta is {theta} and factor {factor}'
  elif _KINDS.keys() & rope.keys():
    why = f'a table of positions has {", ".join(_KINDS.keys() & rope.keys())}'
  else:
    return float(theta), float(factor)
  raise UserError(
    f'{path}: {why}; readable are rope_type default and linear,'
    ' with a rope_theta and, if linear, a factor.'
  )


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
      f'{path}: layer_types has {len(types)} entries,'
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


def _query_scale(config: gemma.Config) -> float:
  return config.query_scale or config.head_size**-0.5


def essence(config: gemma.Config) -> dict[str, Any]:
  """What of a config decides on the numbers, the vocabulary's rows apart."""
  found, kinds = dataclasses.asdict(config), configs.kinds(config)
  for name in ('vocab_size', 'used_vocab', 'lora_scale', 'gating_transposed',
               'pattern'):  # fmt: skip
    del found[name]
  found['kinds'] = ' '.join(kinds)
  found['query_scale'] = float(f'{_query_scale(config):.6g}')
  if 'local' not in kinds:
    found['window'] = found['local_rope_base'] = None
  if 'global' not in kinds:
    found['global_rope_base'] = found['global_rope_scale'] = None
  return found


def known_as(config: gemma.Config) -> str | None:
  """The name under which models/gemma knows a model."""
  for name, sizes in gemma.CONFIGS.items():
    if essence(sizes) == essence(config):
      return name
  return None
