"""Adapters as folders of peft, out and in.

There every module has an A [r, in] and a B [out, r]. So has each matrix of an
array of ours that holds several, keys and values for instance: every adapter
of one kind is an adapter of the other.
"""

import math
import os
import re
from typing import Any

import numpy as np

from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.runs import files
from bond_jax.types import Params
from bond_jax.weights import stacks
from bond_jax.weights.huggingface import config_json, layout, reader, writer

TENSORS = 'adapter_model.safetensors'
CONFIG = 'adapter_config.json'

_ROOT = 'base_model.model.'  # peft's own, before the names of the model
# Of an image encoder, which text models do not use.
_IMAGES = ('vision_tower.', 'multi_modal_projector.')
# Allowed values in an adapter_config.json, beside absent, false and empty: with
# others the adapter is another function than W + alpha / r B A.
_PLAIN = {
  'peft_type': ('LORA',),
  'bias': ('none',),
  # Others start from a base that they have changed.
  'init_lora_weights': (True, 'gaussian', 'orthogonal', 'eva'),
  **dict.fromkeys(
      ('use_rslora', 'use_dora', 'modules_to_save', 'lora_bias',
       'rank_pattern', 'alpha_pattern', 'fan_in_fan_out', 'layer_replication',
       'trainable_token_indices', 'target_parameters', 'use_qalora',
       'alora_invocation_tokens', 'use_bdlora', 'arrow_config', 'kasa_config',
       'monteclora_config'),
      (),
  ),
}  # fmt: skip
# peft reads the name of its first adapter in a tensor's as none.
_HALF = re.compile(r'(.+\.lora_[AB])(?:\.default)?(\.weight)')
_WITH_IMAGES = 'gemma3_4b', 'gemma3_12b', 'gemma3_27b'  # as released
_MERGE = 'merge it into its model with peft, and start from that model'


def export_adapter(
  adapters: Params, config: gemma.Config, path: str, *, base: str
) -> None:
  """Writes adapters in float32 as a folder that peft reads.

  Args:
    adapters: as in models/lora.py, without `lora_delta`.
    config: of the model, with lora_scale.
    path: the folder to make.
    base: the model that they adapt, a folder or a name (with @commit or not).
  """
  images = _has_images(config, base)
  prefix = _ROOT + (layout.PREFIXES[-1] if images else 'model.')
  leaves = dict(stacks.nested(config, adapters))
  tensors: dict[str, np.ndarray] = {}
  for name, x in leaves.items():
    parts = layout.lora_parts(config, name)
    for part, copy in writer.copies_of(parts, np.asarray(x)):
      tensors[prefix + part.tensor] = copy
  (rank,) = {x.shape[0] for name, x in tensors.items() if 'lora_A' in name}
  modules = _modules(tensors)
  alpha = config.lora_scale * rank
  commit = ''
  if not os.path.isdir(base):
    base, _, commit = base.partition('@')
  described = {
    'peft_type': 'LORA',
    'task_type': 'CAUSAL_LM',
    'base_model_name_or_path': base,
    'revision': commit or None,
    'r': rank,
    'lora_alpha': round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
    # An image encoder has modules of the same names.
    'target_modules': (
      rf'.*language_model.*\.({"|".join(modules)})' if images else modules
    ),
    'lora_dropout': 0.0,
    'bias': 'none',
    'inference_mode': True,
  }
  shapes = {k: x.shape for k, x in tensors.items()}
  size = writer.bytes_of(shapes, 'float32')
  with writer.new_folder(path, size) as folder:
    file = os.path.join(folder, TENSORS)
    writer.write_tensors(file, iter(tensors.items()), shapes, 'float32')
    files.write_json(os.path.join(folder, CONFIG), described)


def load_adapter(path: str, config: gemma.Config, like: Params) -> Params:
  """Loads adapters from a folder of peft into the shards of `like`.

  Args:
    path: a local folder, or a repository as `hf.resolve` takes it.
    config: of the model, with lora_scale.
    like: the tree of models/lora.py as jax.ShapeDtypeStruct with shardings.

  Returns:
    Arrays as in `like`. A UserError for a folder that is damaged, for an
    adapter of another rank, scale, model or set of weights, and for one that
    is more than a low-rank sum. Adapters of an image encoder are left out.
  """
  folder = reader.resolve(path)
  leaves = dict(stacks.nested(config, like))
  (rank,) = {x.shape[-1] for k, x in leaves.items() if k.endswith('lora_a')}
  base = _check_config(folder, rank, config.lora_scale * rank)
  tensors = _open(folder)
  size = {**layout.sizes(config), 'r': rank}
  parts = {name: layout.lora_parts(config, name) for name in leaves}
  wanted = {
    part.tensor: layout.shape(part, size)
    for copies in parts.values()
    for part in copies
  }
  _check_tensors(folder, tensors, wanted, base)
  return stacks.assemble(
    config,
    like,
    lambda name, struct: reader.read_parts(tensors, parts[name], size, struct),
  )


def _check_config(folder: str, rank: int, alpha: float) -> str:
  """Refuses what is not plain or differs; returns the name of the base."""
  file = os.path.join(folder, CONFIG)
  raw = files.read_json(file, 'it is no folder of a peft adapter')
  for key, allowed in _PLAIN.items():
    if raw.get(key) and raw[key] not in allowed:
      raise UserError(
        f'{file} says {key} {_short(raw[key])}; only adapters that are'
        f' W + alpha / r B A can be loaded; {_MERGE}.'
      )
  for key, ours, wanted in ('r', 'rank', rank), ('lora_alpha', 'alpha', alpha):
    found = raw.get(key)
    if not isinstance(found, int | float) or not math.isclose(found, wanted):
      raise UserError(
        f'{file} says {key} {_short(found)}, the config model.lora.{ours}'
        f' {wanted:g}; set it to what the adapter has.'
      )
  return _short(raw.get('base_model_name_or_path'))


def _open(folder: str) -> dict[str, reader.Tensor]:
  """The text model's tensors, by their names below its prefix."""
  file = os.path.join(folder, TENSORS)
  if not os.path.exists(file):
    raise UserError(
      f'{folder} has no {TENSORS}; an adapter in another format must be'
      ' converted first, say by save_pretrained of peft.'
    )
  tensors = reader.headers(file)
  prefixes = [_ROOT + p for p in layout.PREFIXES]
  inside = lambda prefix: any(k.startswith(f'{prefix}layers.') for k in tensors)
  prefix = next(filter(inside, prefixes), prefixes[0])
  halves: dict[str, reader.Tensor] = {}
  for name, x in tensors.items():
    if any(part in name for part in _IMAGES):
      continue
    match = _HALF.fullmatch(name.removeprefix(prefix))
    half = ''.join(match.groups()) if match else ''
    if not half or half in halves:
      raise UserError(
        f'{file} holds {name}, which is no lora_A.weight or lora_B.weight of a'
        f' module, or is there twice (with the name default); {_MERGE}.'
      )
    halves[half] = x
  return halves


def _check_tensors(
  folder: str,
  tensors: dict[str, reader.Tensor],
  wanted: dict[str, tuple[int, ...]],
  base: str,
) -> None:
  """Refuses other modules, other shapes, and numbers that are not floats."""
  adapted, targets = _modules(tensors), _modules(wanted)
  if adapted != targets:
    raise UserError(
      f'{folder} adapts {", ".join(adapted)}, model.lora.targets of the config'
      f' choose {", ".join(targets)}, where modules that are one array here'
      f' (keys and values, gate and up) go together; set the targets, or'
      f' {_MERGE}.'
    )
  found = {k: x.shape for k, x in tensors.items()}
  if found != wanted:
    rows = stacks.differences(found, wanted).replace('\n ', ';')
    raise UserError(
      f'{folder}, for {base}, is of another model than that of the config, or'
      f' not of all its layers (layers_to_transform){rows}; set the model, or'
      f' {_MERGE}.'
    )
  for tensor in tensors.values():
    reader.check_dtype(tensor)


def _modules(names) -> list[str]:
  """Of 'layers.3.mlp.up_proj.lora_A.weight' and others: up_proj, once each."""
  return sorted({k.rsplit('.', 2)[0].rpartition('.')[2] for k in names})


def _short(value: Any) -> str:
  """A value of their JSON on one line that stays one."""
  text = ' '.join(repr(value).split())
  return text if len(text) < 100 else f'{text[:100]} ...'


def _has_images(config: gemma.Config, base: str) -> bool:
  """Whether the base sees images: by its config.json, else as released."""
  if os.path.exists(os.path.join(base, 'config.json')):
    return 'text_config' in reader.read_config(base)
  return config_json.known_as(config) in _WITH_IMAGES
