"""Memory and time of log-probs and their gradient at a real vocabulary.

    python -m benchmarks.head --d=128

The head alone: hidden states are given, 4,096 of them, V = 262,144. Beside it
the plain computation, which holds float32 logits [B, T, V]. Prints one line of
JSON. Needs 18 GB.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from bond_jax.models import log_probs
from bond_jax.models.gemma.layers import logits
from bond_jax.types import Policy, Prompts

ROWS, LENGTH, VOCAB = 8, 512, 262_144
CHUNK = 256  # tokens at one time


def head_log_probs(params, tokens):
  """The call that is measured: bond_jax's, on a model that is all head.

  params: hidden f32[R, T, D] and the embedder; tokens i32[R, T] -> f32[R, T].
  """
  hidden = params['hidden']
  rows = len(hidden)
  policy = Policy(
    init=None,
    hidden=lambda params, *_: params['hidden'],
    logits=functools.partial(
      logits, softcap=None, temperature=1.0, used_vocab=None
    ),
    prepare=None,
    decoder=None,
    vocab_size=params['embedder']['input_embedding'].shape[0],
  )
  prompts = Prompts(
    jnp.zeros((rows, 1), jnp.int32),
    jnp.ones((rows, 1), bool),
    jnp.arange(rows),
    jnp.ones(rows),
  )
  mask = jnp.ones_like(tokens, bool)
  out = log_probs.log_probs(
    policy, params, prompts, tokens[:, None], mask[:, None], chunk=CHUNK
  )
  return out[:, 0]


def plain_log_probs(params, tokens):
  """The same, with all logits at once."""
  table = params['embedder']['input_embedding']
  logits = jnp.einsum('RTD,VD->RTV', params['hidden'], table)
  law = jax.nn.log_softmax(logits.astype(jnp.float32), -1)
  return jnp.take_along_axis(law, tokens[..., None], -1)[..., 0]


def compiled(f, params, tokens):
  """Log-probs, and the gradient of a weighted sum of them."""

  def loss(params, tokens, weight):
    out = f(params, tokens)
    return (out * weight).sum(), out

  weight = jnp.linspace(0.5, 1.5, tokens.size).reshape(tokens.shape)
  program = jax.jit(jax.grad(loss, has_aux=True))
  return program.lower(params, tokens, weight).compile(), weight


def inputs(features: int, rows: int, length: int, vocab: int):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape, np.float32)
  table = normal(vocab, features) * features**-0.5
  params = {
    'hidden': jnp.asarray(normal(rows, length, features)),
    'embedder': {'input_embedding': jnp.asarray(table)},
  }
  tokens = rng.integers(0, vocab, (rows, length)).astype(np.int32)
  return params, jnp.asarray(tokens)


def measure(
  features: int, rounds: int, rows=ROWS, length=LENGTH, vocab=VOCAB
) -> dict:
  """Bytes and seconds of both, in turns; and how far apart they are."""
  params, tokens = inputs(features, rows, length, vocab)
  found, seen = {}, {}
  programs = {}
  for name, f in (('ours', head_log_probs), ('plain', plain_log_probs)):
    programs[name], weight = compiled(f, params, tokens)
    memory = programs[name].memory_analysis().temp_size_in_bytes
    found[name] = dict(temporary=memory, seconds=[])
    out = programs[name](params, tokens, weight)
    gradient = out[0]['embedder']['input_embedding']
    seen[name] = np.asarray(out[1]), np.asarray(gradient)
    del out, gradient
  gap = lambda i: float(np.abs(seen['ours'][i] - seen['plain'][i]).max())
  gaps = dict(log_prob=gap(0), gradient=gap(1))
  for i in range(rounds):
    for name in list(programs)[:: -1 if i % 2 else 1]:
      program = programs[name]
      start = time.perf_counter()
      jax.block_until_ready(program(params, tokens, weight))
      found[name]['seconds'].append(time.perf_counter() - start)
  return dict(d=features, gap=gaps, **found)


if __name__ == '__main__':
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--d', type=int, required=True)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  print(json.dumps(measure(args.d, args.rounds)))
