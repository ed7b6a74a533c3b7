"""Any text model of the gemma library as a Policy: Gemma 3n and 4 as well.

A config names a model as the library does, model.name = 'Gemma3n_E2B'. Slower
and larger than ours: importing the library loads TensorFlow; its layers are
neither scanned nor rematerialised; caches of local layers are as long as those
of global ones; attention scores take the dtype of the computation.

Its models return logits and the hidden states under them. A Policy hands on the
hidden states and runs the head apart, in float32 and where it is asked for;
under `jax.jit` the compiler removes the logits that nobody reads.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from bond_jax.errors import UserError
from bond_jax.models.gemma.layers import logits
from bond_jax.types import Array, Decoder, Params, Policy


def model(name: str) -> Any:
  """The library's text model of that name, say 'Gemma3n_E2B', in float32."""
  gm = _import()
  known = [n for n in dir(gm.nn) if n.startswith('Gemma')]
  if name not in known:
    raise UserError(
      f'the gemma library has no model {name!r}; known are {", ".join(known)}.'
    )
  kind = getattr(gm.nn, name)
  text_only = {'text_only': True} if hasattr(kind, 'text_only') else {}
  return kind(dtype=jnp.float32, **text_only)


def make(
  model: Any, *, temperature: float, dtype: str, used_vocab: int | None = None
) -> Policy:
  """A model of `gemma.gm.nn` as a Policy over the library's own parameters.

  Args:
    model: an instance, as of `model(name)`.
    temperature: divides the logits.
    dtype: of the computation, 'float32' or 'bfloat16'.
    used_vocab: tokens that may be drawn, the first of them; None = all.
  """
  if temperature <= 0:
    raise ValueError(f'temperature must be > 0, got {temperature}')

  def init(key):
    with jax.numpy_rank_promotion('allow'):  # it relies on that
      params = model.init(key, jnp.zeros((1, 1), jnp.int32))['params']
    return jax.tree.map(lambda x: x.astype(jnp.float32), params)

  head = functools.partial(
    logits, softcap=model.config.final_logit_softcap, temperature=temperature,
    used_vocab=used_vocab,
  )  # fmt: skip
  return Policy(
    init=init,
    hidden=lambda *args: _hidden(model, dtype, *args, None)[0],
    logits=head,
    prepare=lambda params: jax.tree.map(lambda x: x.astype(dtype), params),
    decoder=functools.partial(_decoder, model, head, dtype),
    vocab_size=model.config.num_embed,
  )


def _decoder(model: Any, logits, dtype: str, params: Params) -> Decoder:
  """See Decoder. A prompt's completions have a copy of its cache each.

  The library keeps one place for all rows of a cache, so none can begin anew.
  """

  def empty(rows, length):
    return dict(
      library=model.init_cache(
        batch_size=rows, dtype=jnp.dtype(dtype), cache_length=length
      ),
      position=jnp.full((rows, length), -1, jnp.int32),
      slot=jnp.int32(0),
    )

  def prefill(tokens, mask):
    hidden, cache = _hidden(
      model, dtype, params, tokens, mask, empty(*tokens.shape)
    )
    return hidden[:, -1], cache

  def start(prefix, width, length):
    b, p = prefix['position'].shape

    def put(new, old):
      old = jnp.repeat(old, width, 0) if old.ndim else old
      if old.ndim < 2:
        return old
      return jax.lax.dynamic_update_slice_in_dim(new, old, 0, 1)

    return jax.tree.map(put, empty(b * width, p + length), prefix)

  def step(token, alive, cache):
    hidden, cache = _hidden(
      model, dtype, params, token[:, None], alive[:, None], cache
    )
    return hidden[:, 0], cache

  return Decoder(prefill, start, step, None, functools.partial(logits, params))


def _hidden(
  model: Any,
  dtype: str,
  params: Params,
  tokens: Array,
  mask: Array,
  cache: Any,
) -> tuple[Array, Any]:
  """Hidden states, and the advanced cache: positions come from the mask."""
  before = 0 if cache is None else cache['position'].max(-1, keepdims=True) + 1
  position = jnp.where(mask, before + jnp.cumsum(mask, -1) - 1, -1)
  position = position.astype(jnp.int32)
  seen = position  # that of every key
  if cache is not None:
    seen = jax.lax.dynamic_update_slice_in_dim(
      cache['position'], position, cache['slot'], 1
    )
  query, key = position[:, :, None], seen[:, None, :]
  with jax.numpy_rank_promotion('allow'):  # it relies on that
    out = model.apply(
      {'params': jax.tree.map(lambda x: x.astype(dtype), params)},
      tokens,
      positions=jnp.maximum(position, 0),
      attention_mask=(key >= 0) & (key <= query),
      cache=None if cache is None else cache['library'],
      return_hidden_states=True,
    )
  if cache is not None:
    slot = cache['slot'] + tokens.shape[1]
    cache = dict(library=out.cache, position=seen, slot=slot)
  return out.hidden_states, cache


def _import():
  try:
    from gemma import gm
  except ImportError as e:
    raise UserError(
      f'models of the gemma library need that package ({e}); install'
      ' requirements-gemma.txt.'
    ) from e
  return gm
