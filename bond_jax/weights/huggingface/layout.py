"""Gemma's tensors as Hugging Face names them and lays them out.

A matrix there is [out, in], and axes that belong together are one: `q_proj` is
[N H, D] where our `q_einsum/w` is [N, D, H]. The letters are those of
`models/gemma.py`; C counts the matrices that we keep in one array.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from bond_jax.models.gemma import configs, layers
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import stacks

# Where the text model may lie in a folder: alone, and in the two generations
# of names that there are beside an image encoder.
PREFIXES = ('model.', 'language_model.model.', 'model.language_model.')


class Part(NamedTuple):
  """Where one of our matrices lies in a Hugging Face folder."""

  tensor: str  # without its prefix: 'layers.3.self_attn.q_proj.weight'
  axes: str  # of our matrix, without C: 'NDH'
  groups: tuple[str, ...]  # of the tensor: 'NH', 'D'


# leaf -> axes of the tensor, and a name for each copy. A norm has one axis.
_MODULES = {
  'attn/q_einsum/w': (('NH', 'D'), 'self_attn.q_proj'),
  'attn/kv_einsum/w': (('KH', 'D'), 'self_attn.k_proj self_attn.v_proj'),
  'attn/qkv_einsum/w': (
    ('NH', 'D'), 'self_attn.q_proj self_attn.k_proj self_attn.v_proj',
  ),
  'attn/attn_vec_einsum/w': (('D', 'NH'), 'self_attn.o_proj'),
  'mlp/gating_einsum': (('F', 'D'), 'mlp.gate_proj mlp.up_proj'),
  'mlp/linear': (('D', 'F'), 'mlp.down_proj'),
  'attn/_query_norm/scale': (('H',), 'self_attn.q_norm'),
  'attn/_key_norm/scale': (('H',), 'self_attn.k_norm'),
  'pre_attention_norm/scale': (('D',), 'input_layernorm'),
  'post_attention_norm/scale': (('D',), 'post_attention_layernorm'),
  'pre_ffw_norm/scale': (('D',), 'pre_feedforward_layernorm'),
  'post_ffw_norm/scale': (('D',), 'post_feedforward_layernorm'),
}  # fmt: skip
_LORA = re.compile(r'(.+/)(?:(\w+)_)?lora_(\w+)')


def parts(config: gemma.Config, name: str) -> list[Part]:
  """Where the array of that nested name lies, one part for each copy."""
  if name == 'embedder/input_embedding':
    return [Part('embed_tokens.weight', 'VD', ('V', 'D'))]
  if name == 'final_norm/scale':
    return [Part('norm.weight', 'D', ('D',))]
  layer, leaf = name.removeprefix('layer_').split('/', 1)
  groups, modules = _MODULES[leaf]
  axes = groups[0] if len(groups) == 1 else configs.axes(config, leaf)[0]
  if leaf == 'pre_ffw_norm/scale' and not config.post_norms:
    modules = 'post_attention_layernorm'  # Gemma 1's name for it
  return [
    Part(f'layers.{layer}.{module}.weight', axes.removeprefix('C'), groups)
    for module in modules.split()
  ]


def weight_of(name: str) -> tuple[str, str] | None:
  """The weight that an adapter's leaf is for, and 'a', 'b' or 'delta'."""
  match = _LORA.fullmatch(name)
  return match and (match[1] + (match[2] or 'w'), match[3])


def lora_parts(config: gemma.Config, name: str) -> list[Part]:
  """As `parts`, of `.../lora_a` [r, in] or `.../lora_b` [out, r]."""
  weight, letter = weight_of(name)
  found = []
  for part in parts(config, weight):
    out, into = part.groups
    a, b = layers.lora_axes(into, part.axes)
    axes, groups = (a, ('r', into)) if letter == 'a' else (b, (out, 'r'))
    module = part.tensor.removesuffix('.weight')
    tensor = f'{module}.lora_{letter.upper()}.weight'
    found.append(Part(tensor, axes, groups))
  return found


def shape(part: Part, size: dict[str, int]) -> tuple[int, ...]:
  """Of a tensor, from the sizes of the axes."""
  return tuple(math.prod(size[i] for i in group) for group in part.groups)


def sizes(config: gemma.Config) -> dict[str, int]:
  """Letter -> size."""
  c = config
  return dict(V=c.vocab_size, D=c.features, N=c.heads, K=c.kv_heads,
              H=c.head_size, F=c.feed_forward)  # fmt: skip


def tensors(config: gemma.Config, rows: int) -> dict[str, tuple[int, ...]]:
  """Name, without its prefix -> shape; `rows` are those of the embedding."""
  size = {**sizes(config), 'V': rows}
  return {
    part.tensor: shape(part, size)
    for name in stacks.shapes(config)
    for part in parts(config, name)
  }


def to_hf(part: Part, x: np.ndarray) -> np.ndarray:
  """One matrix, in the layout of Hugging Face."""
  size = dict(zip(part.axes, x.shape, strict=True))
  order = ''.join(part.groups)
  x = x.transpose([part.axes.index(i) for i in order])
  return x.reshape(shape(part, size))


def slices(
  part: Part, size: dict[str, int], index: dict[str, slice]
) -> tuple[slice, ...]:
  """The part of a tensor to read for `index` of our matrix."""
  found = []
  for first, *rest in part.groups:
    step = math.prod(size[i] for i in rest)
    found.append(slice(index[first].start * step, index[first].stop * step))
  return tuple(found)


def from_hf(
  part: Part, size: dict[str, int], index: dict[str, slice], x: np.ndarray
) -> np.ndarray:
  """`index` of our matrix, from the part that `slices` gave."""
  full, cut = [], []
  for first, *rest in part.groups:
    full += [index[first].stop - index[first].start, *(size[i] for i in rest)]
    cut += [slice(None), *(index[i] for i in rest)]
  order = ''.join(part.groups)
  x = x.reshape(full)[tuple(cut)]
  return x.transpose([order.index(i) for i in part.axes])
