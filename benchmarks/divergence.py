"""Where completions drawn together leave those drawn alone.

    PYTHONPATH=. python benchmarks/divergence.py

The demo's model with random weights, 32 prompts of up to 32 tokens, 64 new
ones. Eight completions of each prompt side by side, and the same through eight
slots, against each completion drawn alone with the same key. In float32 all
tokens are equal; bfloat16 rounds otherwise in products of another shape, and a
draw that lies between two tokens falls the other way.
"""

import functools

import jax
import numpy as np

from bond_jax.models.gemma import model as gemma
from bond_jax.models.sampling import Limits, sample
from bond_jax.models.stops import Stop
from bond_jax.types import Prompts

CONFIG = gemma.CONFIGS['gemma3_tiny']
B, P, NUM, T = 32, 32, 8, 64


def compare(dtype: str) -> None:
  policy = gemma.make(
    CONFIG, temperature=1.0, dtype=dtype, scan=False, remat='none'
  )
  params = jax.jit(functools.partial(gemma.init, CONFIG))(jax.random.key(0))
  rng = np.random.default_rng(0)
  mask = np.arange(P)[None] >= P - rng.integers(1, P + 1, (B, 1))
  prompts = Prompts(
    rng.integers(3, CONFIG.vocab_size, (B, P)).astype(np.int32), mask,
    np.arange(B, dtype=np.int32), np.ones(B, np.float32),
  )  # fmt: skip

  @functools.cache
  def program(num, slots):
    draw = functools.partial(
      sample, policy, num=num, limits=Limits(T, Stop((1,)), slots)
    )
    return jax.jit(
      lambda prompts, first: (
        draw(params, prompts, jax.random.key(1), first=first).completion
      )
    )

  alone = np.array(
    [
      [
        program(1, 0)(jax.tree.map(lambda x, i=i: x[i : i + 1], prompts), k)
        for k in range(NUM)
      ]
      for i in range(B)
    ]
  ).reshape(B, NUM, T)
  for name, slots in (('side by side', 0), ('through 8 slots', 8)):
    together = np.asarray(program(NUM, slots)(prompts, 0))
    differs = together != alone
    parted = differs.any(-1)
    line = f'{dtype}, {name}: {parted.sum()} of {parted.size} completions part'
    if parted.any():
      first = differs.argmax(-1)[parted]
      line += f', the first at token {first.min()}, the median at token' \
              f' {int(np.median(first))}'  # fmt: skip
    print(line, flush=True)


if __name__ == '__main__':
  for dtype_ in ('float32', 'bfloat16'):
    compare(dtype_)
