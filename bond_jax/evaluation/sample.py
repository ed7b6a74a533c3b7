"""Draws completions of a prompt, or of one line after another."""

import dataclasses
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
from bond_jax.runs import command, environment, paths
from bond_jax.runs.settings import configs, defaults
from bond_jax.training.tasks import text_task
from bond_jax.weights import identify, load, teachers


def open_run(
  config: ml_collections.ConfigDict,
  workdir: str,
  which: str,
  factor: float = 1.0,
):
  """A run's tokenizer, and what draws from its policy; see `make_draw`.

  `factor`: the policy is extrapolated by it; see `load.extrapolated`.
  """
  load.check_factor(which, factor)
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = load.load_tokenizer(config, workdir)
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  if which == 'reference' and config.teacher:
    teacher = teachers.find(config, tokenizer)
    return tokenizer, make_draw(
      config, tokenizer, mesh, teacher.policy, {}, teacher.load(mesh)
    )
  if which != 'reference':
    params = load.load_policy(config, policy, workdir, which, mesh, alone=True)
  reference, base = load.load_frozen(config, policy, workdir, mesh)
  if which == 'reference':
    params = reference
  else:
    params = load.extrapolated(config, params, reference, factor)
  return tokenizer, make_draw(config, tokenizer, mesh, policy, base, params)


def open_weights(config: ml_collections.ConfigDict):
  """As `open_run`, of `config.weights` alone."""
  mesh = sharding.make_mesh(**config.mesh)
  tokenizer = load.load_tokenizer(config, '')
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  params = load.load_weights(config, mesh, config.model.dtype)
  return tokenizer, make_draw(config, tokenizer, mesh, policy, {}, params)


def make_draw(config, tokenizer, mesh, policy, base, params):
  """Returns the function that draws.

  draw(row, pieces, n, seed) -> the arguments of a reward: n completions of the
  prompt that a row of data became. They depend on pieces, n and seed alone.
  """
  stop = stops.of(tokenizer, config.stop)
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

  return draw


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
  model,
  judge=None,
  *,
  prompt: str | None,
  n: int,
  seed: int,
) -> None:
  """Completes `prompt`, or holds a conversation if it is None.

  `model`: a tokenizer and what draws; see `open_run` and `open_weights`.
  """
  turns = config.prompt.kind == 'turn'
  tokenizer, draw = model
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


def from_run(
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  prompt: str | None,
  n: int,
  best: bool,
  checkpoint: str,
  seed: int,
  factor: float = 1.0,
) -> None:
  """Talks with the policy of a run, or with what it started from."""
  environment.configure_jax()
  defaults.check(config.to_dict(), (*defaults.COMMON, *defaults.TEXT_NEEDS))
  why = f'this config has {config.prompt.kind!r}'
  check_prompt(prompt, config.prompt.kind == 'turn', why)
  judge = None
  if best:
    make.check_reward(config.reward)
    judge = make.make_ask(config, 'reward', workdir, failure='stop')
  model = open_run(config, workdir, checkpoint, factor)
  talk(config, model, judge, prompt=prompt, n=n, seed=seed)


def config_of(
  weights: identify.Weights, length: int, temperature: float
) -> ml_collections.ConfigDict:
  """What a run would say of weights that answer, or complete a text."""
  config = defaults.make('text')
  sizes = dataclasses.asdict(weights.sizes)
  for name in 'used_vocab', 'lora_scale':
    del sizes[name]
  tokenizer = tokenizer_lib.load(weights.tokenizer)
  sizes['vocab_size'] = max(sizes['vocab_size'], tokenizer.vocab_size)
  config.update(weights=weights.path, length=length)
  config.tokenizer.update(
    path=weights.tokenizer, vocab_size=tokenizer.vocab_size
  )
  # A family's name, and all of the sizes.
  name = 'gemma3_1b' if weights.sizes.qk_norm else 'gemma_2b'
  cpu = jax.default_backend() == 'cpu'
  config.model.update(
    name=name,
    temperature=temperature,
    dtype='float32' if cpu else 'bfloat16',
    scan=not cpu,  # where a loop is a third slower, and compiles little sooner
  )
  with config.unlocked():
    config.model.sizes = sizes
  config.prompt.kind = 'turn' if weights.turns else 'text'
  return config


def check_prompt(prompt: str | None, turns: bool, why: str) -> None:
  if prompt is None and not turns:
    raise UserError(
      f'a conversation needs prompts of kind "turn", and {why}; give --prompt.'
    )


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  weights = paths.flag('weights', None, 'Weights, in the place of a run.')
  tokenizer = paths.flag('tokenizer', '', "The weights' SentencePiece file.")
  length = flags.DEFINE_integer(
    'length', 128, 'New tokens at most, with --weights.', lower_bound=1
  )
  temperature = flags.DEFINE_float(
    'temperature', 1.0, 'With --weights.', lower_bound=0.0
  )
  prompt = flags.DEFINE_string('prompt', None, 'What to complete or answer.')
  n = flags.DEFINE_integer('n', 1, 'Completions to draw.', lower_bound=1)
  best = flags.DEFINE_bool('best', False, 'Only the one with the best reward.')
  checkpoint = command.checkpoint_flag()  # here also "reference"
  factor = command.extrapolate_flag()
  seed = flags.DEFINE_integer('seed', 0, 'Another seed draws others.')
  given = command.run_flags()

  def main() -> None:
    alone = weights.value is not None
    of_run = 'config', 'workdir', 'checkpoint', 'best', 'extrapolate'
    of_weights = 'tokenizer', 'length', 'temperature'
    for name in of_run if alone else of_weights:
      if flags.FLAGS[name].present:
        raise UserError(
          f'--{name} is for {"runs" if alone else "--weights"}; of a run give'
          ' --workdir and --config.length and the like, of weights --weights.'
        )
    if not alone:
      from_run(
          *given(), prompt=prompt.value, n=n.value, best=best.value,
          checkpoint=checkpoint.value, factor=factor.value, seed=seed.value,
      )  # fmt: skip
      return
    environment.configure_jax()
    found = identify.identify(weights.value, tokenizer.value)
    why = f'{weights.value} only completes text'
    check_prompt(prompt.value, found.turns, why)
    config = config_of(found, length.value, temperature.value)
    model = open_weights(config)
    talk(config, model, prompt=prompt.value, n=n.value, seed=seed.value)

  command.execute(main, doc)
