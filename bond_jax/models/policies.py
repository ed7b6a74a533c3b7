"""The model that `config.model` describes, as sizes and as a Policy."""

import dataclasses
import functools
from typing import Any

from bond_jax.errors import UserError
from bond_jax.models import library, lora
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Algorithm, Policy


def make_sizes(model: Any, used_vocab: int) -> gemma.Config:
  """The sizes of a model; tokens from `used_vocab` on are never drawn.

  Args:
    model: what `config.model` holds: name, sizes, lora and so on.
    used_vocab: tokens that the tokenizer has.
  """
  if is_library(model):
    raise UserError(
      f'{model.name} is a model of the gemma library: LoRA, model.sizes and'
      f' Hugging Face folders are for {", ".join(gemma.CONFIGS)} alone.'
    )
  if model.name not in gemma.CONFIGS:
    raise UserError(
      f'model.name is {model.name!r}; known are {", ".join(gemma.CONFIGS)},'
      " and models of the gemma library, 'Gemma3n_E2B' for instance."
    )
  try:
    sizes = dataclasses.replace(gemma.CONFIGS[model.name], **model.sizes)
  except TypeError as e:
    raise UserError(
      f'model.sizes: {e}; known are'
      f' {", ".join(f.name for f in dataclasses.fields(gemma.Config))}.'
    ) from e
  if sizes.heads % sizes.kv_heads:
    raise UserError(
      f'model.sizes: heads ({sizes.heads}) must be a multiple of kv_heads'
      f' ({sizes.kv_heads}).'
    )
  if 'local' in sizes.pattern and not sizes.window:
    raise UserError(
      f'model.sizes: local layers need a window, and {model.name} has none; set'
      ' window too.'
    )
  if used_vocab > sizes.vocab_size:
    raise UserError(
      f'tokenizer.vocab_size ({used_vocab}) is larger than the'
      f' {sizes.vocab_size} embedding rows of {model.name}.'
    )
  scale = model.lora.alpha / model.lora.rank if model.lora.rank else None
  return dataclasses.replace(sizes, used_vocab=used_vocab, lora_scale=scale)


def is_library(model: Any) -> bool:
  """Whether the gemma library runs this model: its names begin with 'Gemma'."""
  return model.name.startswith('Gemma')


def make_policy(model: Any, used_vocab: int, *, full: bool = False) -> Policy:
  """The model that `config.model` describes; see `make_sizes`.

  With model.lora.rank its parameters are adapters over a base, unless `full`.
  """
  if model.lora.weights and not model.lora.rank:
    raise UserError(
      f'model.lora.weights is {model.lora.weights} and model.lora.rank is 0;'
      ' set rank, alpha and targets as that adapter has them.'
    )
  if is_library(model):
    return _library_policy(model, used_vocab)
  if model.remat not in gemma.REMAT:
    raise UserError(
      f'model.remat is {model.remat!r}; known are {", ".join(gemma.REMAT)}.'
    )
  sizes = make_sizes(model, used_vocab)
  keys = 'temperature', 'dtype', 'scan', 'remat'
  kwargs = {key: model[key] for key in keys}
  if full or not model.lora.rank:
    return gemma.make(sizes, **kwargs)
  kwargs |= {key: model.lora[key] for key in ('rank', 'alpha', 'targets')}
  return lora.make(sizes, **kwargs)


def _library_policy(model: Any, used_vocab: int) -> Policy:
  again = model.remat != 'none'
  if model.lora.rank or model.sizes or again or model.scan:
    raise UserError(
      f'{model.name} is a model of the gemma library: set model.scan to'
      ' False, model.remat to none, model.lora.rank to 0, and no model.sizes.'
    )
  policy = library.make(
    library.model(model.name),
    temperature=model.temperature,
    dtype=model.dtype,
    used_vocab=used_vocab,
  )
  if used_vocab > policy.vocab_size:
    raise UserError(
      f'tokenizer.vocab_size ({used_vocab}) is larger than the'
      f' {policy.vocab_size} embedding rows of {model.name}.'
    )
  return policy


def with_anchor(algorithm: Algorithm, model: Any) -> Algorithm:
  """The algorithm with the anchor that `model.lora.exact_anchor` asks for."""
  if not (model.lora.rank and model.lora.exact_anchor):
    return algorithm
  sizes = make_sizes(model, used_vocab=1)  # embeddings have no adapters
  view = functools.partial(lora.dense, sizes)
  return algorithm._replace(anchor=algorithm.anchor._replace(view=view))
