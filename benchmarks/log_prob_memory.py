"""Memory and time of log-probs and their gradient beside the plain computation.

    PYTHONPATH=. python benchmarks/log_prob_memory.py --out=runs/log_prob_memory

4,096 tokens (16 rows of 256) over 262,144 pieces, float32, the gradient with
respect to the hidden states and the embedding. The plain computation holds
logits and log-softmax [B, T, V]: 13 GB. Reports XLA's temporary memory (the
gradients, of which that of the embedding is V x features x 4 bytes, are no part
of it) and the medians over rounds that alternate the order of the two. Twenty
minutes on two CPU cores. Writes summary.json.
"""

import argparse
import os
import statistics
import time

import jax
import jax.numpy as jnp

from bond_jax import build, command, metrics
from bond_jax.log_probs import log_probs
from bond_jax.types import Policy, Prompts

VOCAB, ROWS, LENGTH, CHUNK = 262_144, 16, 256, 256


def logits(params, hidden):
  return jnp.einsum(
    '...D,VD->...V',
    hidden,
    params['embedding'],
    preferred_element_type=jnp.float32,
  )


def make_losses(chunk: int):
  """The same number in two ways: f(params, batch), batch = (tokens, weight)."""
  policy = Policy(
    init=None,
    init_cache=None,
    hidden=lambda params, *_: (params['hidden'], None),
    logits=logits,
    vocab_size=VOCAB,
  )

  def plain(params, batch):
    tokens, weight = batch
    log_p = jax.nn.log_softmax(logits(params, params['hidden']), -1)
    chosen = jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0]
    return (chosen * weight).sum()

  def chunked(params, batch):
    tokens, weight = (x[:, None] for x in batch)
    b = len(tokens)
    prompts = Prompts(
      tokens=jnp.zeros((b, 1), jnp.int32),
      mask=jnp.ones((b, 1), bool),
      id=jnp.arange(b),
      weight=jnp.ones(b),
    )
    mask = jnp.ones(tokens.shape, bool)
    found = log_probs(policy, params, prompts, tokens, mask, chunk=chunk)
    return (found * weight).sum()

  return {'plain': plain, 'chunked': chunked}


def measure(features: int, *, rounds: int, chunk: int = CHUNK) -> dict:
  """Both ways at one width, one after another in this process.

  Args:
    features: D.
    rounds: timed runs of each, after one that is not; 0 compiles only.
    chunk: of log_probs.

  Returns:
    'temporary': name -> bytes; 'seconds': name -> list; 'memory_ratio', plain
    over chunked; and 'time_ratio', the median of chunked over plain.
  """
  keys = jax.random.split(jax.random.key(0), 4)
  shape = (ROWS, LENGTH)
  params = {
    'hidden': jax.random.normal(keys[0], (*shape, features)),
    'embedding': jax.random.normal(keys[1], (VOCAB, features)) * features**-0.5,
  }
  batch = (
    jax.random.randint(keys[2], shape, 0, VOCAB),
    jax.random.normal(keys[3], shape),
  )
  programs = {
    name: jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    for name, loss in make_losses(chunk).items()
  }
  temporary = {
    name: program.memory_analysis().temp_size_in_bytes
    for name, program in programs.items()
  }
  seconds = {name: [] for name in programs}
  for i in range(rounds + 1 if rounds else 0):
    for name in list(programs)[:: 1 if i % 2 else -1]:
      start = time.perf_counter()
      jax.block_until_ready(programs[name](params, batch))
      if i:
        seconds[name].append(time.perf_counter() - start)
  ratios = [
    b / a for a, b in zip(seconds['plain'], seconds['chunked'], strict=True)
  ]
  return dict(
    features=features,
    temporary=temporary,
    memory_ratio=temporary['plain'] / temporary['chunked'],
    seconds=seconds,
    time_ratio=statistics.median(ratios) if ratios else None,
  )


def table(found: list[dict]) -> list[tuple]:
  """Rows for `metrics.table`, of what `measure` returned."""
  median = lambda x: round(statistics.median(x), 1) if x else None
  rows = [('features', 'plain, MB', 'chunked, MB', 'plain / chunked',
           'plain, s', 'chunked, s', 'chunked / plain')]  # fmt: skip
  for f in found:
    memory = [round(x / 1e6) for x in f['temporary'].values()]
    rows.append((
        str(f['features']), *memory, f['memory_ratio'],
        *map(median, f['seconds'].values()), f['time_ratio'],
    ))  # fmt: skip
  return rows


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--out', required=True)
  parser.add_argument('--rounds', type=int, default=3)
  args = parser.parse_args()
  build.configure_jax()
  found = [measure(d, rounds=args.rounds) for d in (128, 640)]
  os.makedirs(args.out, exist_ok=True)
  command.write_json(
    os.path.join(args.out, 'summary.json'),
    dict(found=found, versions=build.versions()),
  )
  metrics.table(table(found), f'in {args.out}')


if __name__ == '__main__':
  main()
