"""Draws completions of a prompt from a run, or from the weights it starts from.

    python -m bond_jax.sample --config=... --workdir=RUN --prompt='...' --n=8

`--best` lets the run's reward choose: Best-of-n. Without `--prompt` it is a
conversation, one line at a time. `--checkpoint=reference` asks what the policy
started from.
"""

from __future__ import annotations

import functools

from absl import flags
import jax
import ml_collections
import numpy as np

from bond_jax import (
  build,
  command,
  data,
  environment,
  fields,
  ops,
  origin,
  sampling,
  sharding,
  stops,
  text_task,
)
from bond_jax import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models import lora
from bond_jax.types import Prompts

_PROMPT = flags.DEFINE_string('prompt', None, 'What to complete or answer.')
_N = flags.DEFINE_integer('n', 1, 'Completions to draw.', lower_bound=1)
_BEST = flags.DEFINE_bool('best', False, 'Only the one with the best reward.')
_CHECKPOINT = command.checkpoint_flag()  # here also "reference"
_SEED = flags.DEFINE_integer('seed', 0, 'Another seed draws others.')


def make_draw(config: ml_collections.ConfigDict, workdir: str, which: str):
  """Loads a model; returns its tokenizer and the function that draws.

  draw(row, pieces, n, seed) -> what a reward is called with: n completions of
  the prompt that a row of data became. They depend on pieces, n and seed alone.
  """
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = origin.load_tokenizer(config, workdir)
  stop = stops.of(tokenizer, config.stop)
  policy = origin.make_policy(config.model, config.tokenizer.vocab_size)
  if which != 'reference':
    params = origin.load_policy(
      config, policy, workdir, which, mesh, alone=True
    )
  reference, base = origin.load_frozen(config, policy, workdir, mesh)
  if which == 'reference':
    params = reference

  @functools.partial(
    jax.jit, static_argnames='num', out_shardings=sharding.replicated(mesh)
  )
  def program(base, params, prompts, key, num):
    return sampling.sample(
        lora.over(policy, base), params, prompts, key, num=num,
        length=config.length, stop=stop,
        mesh=sharding.reshaped(mesh, data=1, model=-1),
    )  # fmt: skip

  def draw(row: data.Row, pieces: list[int], n: int, seed: int):
    # Few widths, so that few programs are compiled in a conversation.
    pad = -len(pieces) % 64
    prompts = Prompts(
      tokens=np.array([[0] * pad + pieces], np.int32),
      mask=np.array([[False] * pad + [True] * len(pieces)]),
      id=np.zeros(1, np.int32),
      weight=np.ones(1, np.float32),
    )
    key = build.key(seed, 'sample')
    drawn = jax.device_get(program(base, params, prompts, key, num=n))
    return build.texts(config, tokenizer, [row], prompts, drawn)

  return tokenizer, draw


def show(drawn, judge) -> str:
  """Prints what was drawn, or the best of it; returns what counts."""
  texts = drawn[1][0]
  if judge is None:
    for i, text in enumerate(texts):
      print(f'[{i + 1}] {text}' if len(texts) > 1 else text)
    return texts[0]
  value = judge(*drawn).value[0]
  # Of a judge: how often a completion beats one of the others.
  values = value if value.ndim == 1 else np.asarray(ops.borda(value))
  best = int(np.argmax(values))
  print(
    f'[{best + 1} of {len(texts)}, reward {values[best]:.4g}, mean'
    f' {values.mean():.4g}] {texts[best]}'
  )
  return texts[best]


def ask() -> str:
  """The next line of the user; nothing at the end."""
  try:
    return input('> ').strip()
  except EOFError:
    return ''


def talk(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  prompt: str | None,
  n: int,
  best: bool,
  checkpoint: str,
  seed: int,
) -> None:
  """What the flags ask for."""
  environment.configure_jax()
  fields.check(config.to_dict(), (*build.NEEDED, *text_task.NEEDED))
  turns = config.prompt.kind == 'turn'
  if prompt is None and not turns:
    raise UserError(
      'a conversation needs prompts of kind "turn", this config has'
      f' {config.prompt.kind!r}; give --prompt.'
    )
  judge = None
  if best:
    build.check_reward(config.reward)
    judge = build.make_ask(config, 'reward', workdir, failure='stop')
  tokenizer, draw = make_draw(config, workdir, checkpoint)
  system, messages = origin.has_system_turn(config), []
  while said := ask() if prompt is None else prompt:
    pieces = [tokenizer.bos_id, *tokenizer.encode(said)]
    if turns:
      messages.append({'role': 'user', 'content': said})
      pieces = tokenizer_lib.chat(tokenizer, messages, system=system)
    row = {'messages': list(messages)} if turns else {'text': said}
    text = show(draw(row, pieces, n, seed), judge)
    if prompt is not None:
      return
    messages.append({'role': 'assistant', 'content': text})
    seed += 1


def main(config: ml_collections.ConfigDict, workdir: str) -> None:
  talk(
      config, workdir, prompt=_PROMPT.value, n=_N.value, best=_BEST.value,
      checkpoint=_CHECKPOINT.value, seed=_SEED.value,
  )  # fmt: skip


if __name__ == '__main__':
  command.run(main, __doc__)
