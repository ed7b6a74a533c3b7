"""The pieces of a run, built from its config: the only readers of its names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import importlib
import json
import os
import types
from typing import Any, NamedTuple
import zlib

import jax
from jax.sharding import Mesh
import ml_collections

from bond_jax import (
  command,
  data,
  environment,
  fields,
  fingerprints,
  hosts,
  locks,
  metrics,
  paths,
  saving,
  scoring,
  sharding,
  sources,
  stopping,
  stops,
)
from bond_jax import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.rewards import make as making
from bond_jax.types import (
  Context,
  Frozen,
  Policy,
  PreferenceFn,
  Prompts,
  RewardFn,
  Rollout,
)

# Of a config, whatever its task is.
NEEDED = ('seed', 'reference', 'save_failure', 'task', 'mesh', 'sampling_mesh',
          'model', 'length', 'chunk', 'slots', 'train',
          'algorithm')  # fmt: skip


class Task(NamedTuple):
  """What the train stage trains on, and how it is watched.

  Built by the module that `config.task` names, from `make(config, workdir,
  mesh)`; its `check(config, mesh)` refuses a config before any stage starts.
  """

  policy: Policy
  frozen: Frozen  # the reference, and what is under it, in their shards
  stop: stops.Stop
  batches: Any  # iterator of Prompts, with get_state() and set_state(state)
  reward: Callable[[Prompts, Rollout], scoring.Scored]  # on the host
  # frozen -> probe, a function from params, and one that gives all of frozen,
  # to validation numbers, among them win_rate/reference and kl/reference
  make_probe: Callable[[Frozen], Callable[..., dict[str, float]]]
  facts: Mapping[str, Any] = types.MappingProxyType({})  # for the summary


def task(config: ml_collections.ConfigDict):
  """The module that `config.task` names."""
  command.load(f'{config.task}:check')  # for its one-line errors
  return importlib.import_module(config.task)


def key(seed: int, stream: str) -> jax.Array:
  """The random key of one purpose: no two streams or seeds share draws."""
  return jax.random.fold_in(
    jax.random.key(seed), zlib.crc32(stream.encode('utf-8'))
  )


def make_algorithm(config: ml_collections.ConfigDict):
  """The algorithm whose file in `algorithms/` bears `config.algorithm.name`."""
  name = config.algorithm.name
  folder = os.path.join(os.path.dirname(__file__), 'algorithms')
  known = sorted(
    f[:-3] for f in os.listdir(folder) if f.endswith('.py') and f[0] != '_'
  )
  if name not in known:
    said = f'algorithm.name is {name!r}; known are {", ".join(known)}.'
    raise UserError(said)
  module = importlib.import_module(f'bond_jax.algorithms.{name}')
  args = config.algorithm.args.to_dict()
  rules = {'algorithm': {'args': fields.of_arguments(module.make)}}
  fields.check({'algorithm': {'args': args}}, rules=rules)
  try:
    return module.make(**args)
  except ValueError as e:
    raise UserError(f'algorithm {name}: {e}; args are {args}.') from e


def reference_dir(config: ml_collections.ConfigDict, workdir: str) -> str:
  """The run whose sft and reward stages this one starts from."""
  path = config.reference.replace('{workdir}', workdir)
  return os.path.normpath(paths.expanded(path))


def check_reward(
  section: ml_collections.ConfigDict, name: str = 'reward'
) -> None:
  """Refuses a reward that cannot be called as the config says."""
  for part in _parts(section, lambda value: value).values():
    making.check(part, name)
  if 'failure' in section and section.failure not in scoring.FAILURES:
    raise UserError(
      f'{name}.failure is {section.failure!r}; known are'
      f' {", ".join(scoring.FAILURES)}.'
    )


def _parts(section, filled: Callable[[Any], Any]) -> dict[str, making.Part]:
  """The rewards whose weighted sum a section asks for, by name."""
  some = dict(section.parts) if section.get('parts') else {'': section}
  return {
    name: making.Part(
      part.function,
      {k: filled(v) for k, v in part.args.items()},
      part.weight if name else 1.0,
    )
    for name, part in some.items()
  }


def make_reward(
  config: ml_collections.ConfigDict, section, workdir: str
) -> RewardFn | PreferenceFn:
  """The reward of a section: `function` called with `args`, or many `parts`.

  Of parts, each with a function, args and a weight, it is the weighted sum, of
  judges the weighted mean. In a string argument '{workdir}' stands for this
  run's folder, '{reference}' for that of the run it starts from.
  """

  def filled(value):
    if not isinstance(value, str):
      return value
    value = value.replace('{reference}', reference_dir(config, workdir))
    return value.replace('{workdir}', workdir)

  timeout = section.timeout if 'timeout' in section else 0.0
  return making.reward(_parts(section, filled), timeout)


def make_ask(
  config: ml_collections.ConfigDict, name: str, workdir: str, **rules: Any
) -> Callable[..., scoring.Scored]:
  """The section `name`, made and asked as it says; see `scoring.asker`."""
  section = config[name]
  names = ('missing_eos_penalty', 'length_penalty', 'failure', 'retries')
  rules = {k: section[k] for k in names if k in section} | rules
  return scoring.asker(make_reward(config, section, workdir), **rules)


def rows(config: ml_collections.ConfigDict, split: str) -> data.Source:
  """The rows of a split of the run's data, or of the sources that it mixes."""
  section = config.data
  common = {k: section[k] for k in ('data_dir', 'bad_rows') if k in section}

  def part(name, weight=1.0, fields=None, splits=None):
    names = dict(fields=fields, splits=splits)
    return sources.source(name, split, **names, **common), weight

  for name, args in section.mix.items():
    making.check_arguments(f'data.mix.{name}', part, args)
  if section.mix:
    return sources.Mixture({k: part(**v) for k, v in section.mix.items()})
  return part(section.name, fields=section.fields, splits=section.splits)[0]


def texts(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: data.Source,
  prompts: Prompts,
  drawn: Rollout,
) -> tuple[list[str], list[list[str]], Context]:
  """What a reward is called with; `rows` are the data, arrays on the host.

  Prompts are quoted as `data.last_words` says, an opening as the model saw it.
  """
  some = [rows[int(i)] for i in prompts.id]
  if config.prompt.kind == 'opening':
    said = [tokenizer.decode(row) for row in prompts.tokens]
  else:
    said = [data.last_words(row, config.prompt.kind) for row in some]
  tokens = [
    [y[m].tolist() for y, m in zip(ys, masks, strict=True)]
    for ys, masks in zip(drawn.completion, drawn.mask, strict=True)
  ]
  cut = stops.of(tokenizer, config.stop).cut(drawn.completion, drawn.mask)
  context = Context(some, tokens, ~cut, config.prompt.kind == 'turn')
  return said, [[tokenizer.decode(y) for y in ys] for ys in tokens], context


def check(config: ml_collections.ConfigDict) -> Mesh:
  """The mesh of a config; a UserError for what no stage could work with."""
  fields.check(config.to_dict(), NEEDED)
  settings = config.train
  if not config.model.temperature:
    raise UserError('model.temperature is 0, the greedy law, which is for'
                    ' bond_jax.sample; training needs more.')  # fmt: skip
  mesh = sharding.make_mesh(**config.mesh)
  drawn_on = sharding.reshaped(mesh, **config.sampling_mesh)
  parts = settings.micro_batches
  sharding.check_batch('train.batch', settings.batch, mesh, parts)
  # Each part of the mesh draws whole prompts.
  sharding.check_batch('train.batch', settings.batch, drawn_on, 1)
  algorithm = make_algorithm(config)
  steps = settings.rollouts * settings.epochs
  if steps > 1 and algorithm.num_policy:
    raise UserError(
      f"algorithm {config.algorithm.name} trains on the policy's completions,"
      ' which one update makes stale; set train.rollouts and train.epochs to 1.'
    )
  for name in ('steps', 'save_every'):
    if settings[name] % steps:
      raise UserError(
        f'train.{name} ({settings[name]}) must be a multiple of'
        f' train.rollouts x train.epochs = {steps}: a checkpoint holds no half'
        ' iteration.'
      )
  task(config).check(config, mesh)
  return mesh


def check_stage(
  name: str, config: ml_collections.ConfigDict, workdir: str
) -> None:
  """Refuses a stage that this run does not have."""
  fields.check(config.to_dict(), needed=NEEDED)
  if name not in config:
    raise UserError(
      f'this config has no {name} section: what {config.task} trains on needs'
      ' no such stage.'
    )
  start = reference_dir(config, workdir)
  if name in ('sft', 'reward_model') and start != os.path.normpath(workdir):
    raise UserError(
      f'this config starts from the sft and reward stages of {start}: its'
      f' {name} stage is run there, not in {workdir}.'
    )


def begin(
  name: str,
  config: ml_collections.ConfigDict,
  path: str,
  workdir: str,
  asked: Mapping[str, str],
) -> bool:
  """Joins the other hosts of a stage; whether there is work to do for it.

  A UserError if they are not about to do the same, or if the workdir is
  another config's. `path` is the summary that marks the stage as done.
  """
  hosts.start()
  environment.configure_jax()
  environment.keep_compilations(jax.default_backend())
  command.agree(
    {
      'stage': name,
      'config': json.loads(config.to_json_best_effort()),
      'flags': dict(asked),
      'versions': environment.versions(),
      'code': fingerprints.of_code(os.path.dirname(__file__)),
    }
  )

  def finished() -> bool:
    command.check_workdir(workdir, config)
    if not os.path.exists(path):
      return False
    done = {k: v for k, v in command.read_json(path).items() if k in asked}
    if changed := command.differences(done, asked):
      raise UserError(
        f'{path} is there, with {"; ".join(changed)} asked for now. Nothing was'
        f' changed; move away what the {name} stage wrote to run it again.'
      )
    return True

  if done := hosts.once(finished):
    hosts.say(f'{name}: finished already, see {path}')
  return not done


def claim(config: ml_collections.ConfigDict, workdir: str, folder: str) -> None:
  """Makes the workdir this config's, and `folder` in it, on all hosts."""

  def make() -> None:
    command.claim_workdir(workdir, config)
    os.makedirs(folder, exist_ok=True)

  hosts.once(make)
  hosts.check_shared(folder)


def stage(
  name: str,
  work: Callable[..., dict[str, Any]],
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  folder: str,
  table: Callable[[dict[str, Any]], list[tuple]] = metrics.scalars,
  **asked: str,
) -> None:
  """Runs a stage once: `<workdir>/<folder>/summary.json` marks it done.

  Args:
    name: of the stage, for people.
    work: (config, workdir, **asked) -> the summary.
    config: of the run.
    workdir: of the run.
    folder: in which the summary goes.
    table: what of the summary is shown at the end.
    **asked: flags beside the config; the summary repeats them.
  """
  workdir = paths.expanded(workdir)
  path = os.path.normpath(os.path.join(workdir, folder, 'summary.json'))
  if not begin(name, config, path, workdir, asked):
    return
  with stopping.listening():
    _work(name, work, config, workdir, path, table, asked)
    stopping.hear(hosts.gather(stopping.asked()))
    if stopping.due():  # no stage after it shall start
      raise stopping.stopped(name, None)


def _work(name, work, config, workdir, path, table, asked) -> None:
  """Runs a stage that is not finished; see `stage`."""
  check_stage(name, config, workdir)
  mesh = check(config)
  hosts.check_mesh(mesh)
  with locks.held(workdir, name):
    claim(config, workdir, os.path.dirname(path))
    devices = f'{mesh.size} {jax.default_backend()} device(s)'
    if hosts.count() > 1:
      devices += f' of {hosts.count()} hosts'
    hosts.say(f'{name}: {config.model.name} on {devices}, into {workdir}')
    with saving.on_disk(workdir):
      summary = work(config, workdir, **asked)
      summary = {**summary, **asked, 'versions': environment.versions()}
      if hosts.first():
        command.write_json(path, summary)
        metrics.table(table(summary), f'{name}: done, see {path}')
