"""Draws completions of a prompt, or of one line after another."""

import functools

from absl import flags
import jax
import ml_collections
import numpy as np

from bond_jax.algorithms.parts import ops
from bond_jax.data import examples
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora, policies, sampling, stops
from bond_jax.rewards import make
from bond_jax.runs import command, environment
from bond_jax.runs.settings import configs, defaults
from bond_jax.training.tasks import text_task
from bond_jax.weights import load


def make_draw(config: ml_collections.ConfigDict, workdir: str, which: str):
  """Loads a model; returns its tokenizer and the function that draws.

  draw(row, pieces, n, seed) -> the arguments of a reward: n completions of the
  prompt that a row of data became. They depend on pieces, n and seed alone.
  """
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = load.load_tokenizer(config, workdir)
  stop = stops.of(tokenizer, config.stop)
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  if which != 'reference':
    params = load.load_policy(config, policy, workdir, which, mesh, alone=True)
  reference, base = load.load_frozen(config, policy, workdir, mesh)
  if which == 'reference':
    params = reference

  limits = sampling.Limits(
    config.length, stop, mesh=sharding.reshaped(mesh, data=1, model=-1)
  )

  @functools.partial(
    jax.jit, static_argnames='num', out_shardings=sharding.replicated(mesh)
  )
  def program(base, params, prompts, key, num):
    return sampling.sample(
      lora.over(policy, base), params, prompts, key, limits, num=num
    )

  def draw(row: examples.Row, pieces: list[int], n: int, seed: int):
    # Widths are multiples of 64, so that a conversation compiles few programs.
    width = len(pieces) + -len(pieces) % 64
    prompts = examples.padded([0], [pieces], width)
    key = configs.key(seed, 'sample')
    drawn = jax.device_get(program(base, params, prompts, key, num=n))
    return text_task.texts(config, tokenizer, [row], prompts, drawn)

  return tokenizer, draw


def show(drawn, judge) -> str:
  """Prints all completions, or the best by a judge; returns the first one."""
  texts = drawn[1][0]
  if judge is None:
    for i, text in enumerate(texts):
      print(f'[{i + 1}] {text}' if len(texts) > 1 else text)
    return texts[0]
  value = judge(*drawn).value[0]
  # A judge of pairs: how often a completion beats one of the others.
  values = value if value.ndim == 1 else np.asarray(ops.borda(value))
  best = int(np.argmax(values))
  print(
    f'[{best + 1} of {len(texts)}, reward {values[best]:.4g}, mean'
    f' {values.mean():.4g}] {texts[best]}'
  )
  return texts[best]


def ask() -> str:
  """The next line of the user; '' at the end of input."""
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
  """Completes `prompt`, or holds a conversation if it is None."""
  environment.configure_jax()
  defaults.check(config.to_dict(), (*defaults.COMMON, *defaults.TEXT_NEEDS))
  turns = config.prompt.kind == 'turn'
  if prompt is None and not turns:
    raise UserError(
      'a conversation needs prompts of kind "turn", this config has'
      f' {config.prompt.kind!r}; give --prompt.'
    )
  judge = None
  if best:
    make.check_reward(config.reward)
    judge = make.make_ask(config, 'reward', workdir, failure='stop')
  tokenizer, draw = make_draw(config, workdir, checkpoint)
  system, messages = load.has_system_turn(config), []
  while line := ask() if prompt is None else prompt:
    pieces = [tokenizer.bos_id, *tokenizer.encode(line)]
    if turns:
      messages.append({'role': 'user', 'content': line})
      pieces = tokenizer_lib.chat(tokenizer, messages, system=system)
    row = {'messages': list(messages)} if turns else {'text': line}
    text = show(draw(row, pieces, n, seed), judge)
    if prompt is not None:
      return
    messages.append({'role': 'assistant', 'content': text})
    seed += 1


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  prompt = flags.DEFINE_string('prompt', None, 'What to complete or answer.')
  n = flags.DEFINE_integer('n', 1, 'Completions to draw.', lower_bound=1)
  best = flags.DEFINE_bool('best', False, 'Only the one with the best reward.')
  checkpoint = command.checkpoint_flag()  # here also "reference"
  seed = flags.DEFINE_integer('seed', 0, 'Another seed draws others.')

  def main(config: ml_collections.ConfigDict, workdir: str) -> None:
    talk(
        config, workdir, prompt=prompt.value, n=n.value, best=best.value,
        checkpoint=checkpoint.value, seed=seed.value,
    )  # fmt: skip

  command.run(main, doc)
