"""A stage of a run: done once, by all hosts, in a folder that it holds."""

from collections.abc import Callable
import json
import os
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh
import ml_collections

import bond_jax
from bond_jax.devices import hosts
from bond_jax.errors import UserError
from bond_jax.runs import (
  environment,
  files,
  fingerprints,
  lock,
  paths,
  show,
  stopping,
)
from bond_jax.runs.checkpoints import saving
from bond_jax.runs.settings import configs, defaults


class Run(NamedTuple):
  """What a stage works on, opened once."""

  config: ml_collections.ConfigDict
  workdir: str
  mesh: Mesh
  # Split -> the rows of the run's data, which are opened when first asked for.
  rows: Callable[[str], Any] | None = None


def check_stage(
  name: str, config: ml_collections.ConfigDict, workdir: str
) -> None:
  """Refuses a stage that this run does not have."""
  defaults.check(config.to_dict(), needed=defaults.COMMON)
  if {'draw': 'evaluate'}.get(name, name) not in config:
    raise UserError(
      f'this config has no {name} section: what {config.task} trains on needs'
      ' no such stage.'
    )
  start = configs.reference_dir(config, workdir)
  if name in ('sft', 'reward_model') and start != os.path.normpath(workdir):
    raise UserError(
      f'this config starts from the sft and reward stages of {start}: its'
      f' {name} stage is run there, not in {workdir}.'
    )


def _begin(name, config, path: str, workdir: str, flags) -> bool:
  """Joins the other hosts of a stage; whether there is work to do for it.

  A UserError if they are not about to do the same, or if the workdir is
  another config's. `path` is the summary that marks the stage as done.
  """
  hosts.start()
  environment.configure_jax()
  environment.keep_compilations(jax.default_backend())
  configs.agree(
    {
      'stage': name,
      'config': json.loads(config.to_json_best_effort()),
      'flags': dict(flags),
      'versions': environment.versions(),
      'code': fingerprints.of_code(os.path.dirname(bond_jax.__file__)),
    }
  )

  def finished() -> bool:
    configs.check_workdir(workdir, config)
    if not os.path.exists(path):
      return False
    done = {k: v for k, v in files.read_json(path).items() if k in flags}
    if changed := configs.differences(done, flags):
      raise UserError(
        f'{path} is there, with {"; ".join(changed)} asked for now. Nothing was'
        f' changed; move away what the {name} stage wrote to run it again.'
      )
    return True

  if done := hosts.once(finished):
    hosts.say(f'{name}: finished already, see {path}')
  return not done


def stage(
  name: str,
  work: Callable[..., dict[str, Any]],
  config: ml_collections.ConfigDict,
  workdir: str,
  *,
  folder: str,
  open_run: Callable[[ml_collections.ConfigDict, str], Run],
  table: Callable[[dict[str, Any]], list[tuple]] = show.scalars,
  **flags: str,
) -> None:
  """Runs a stage once: `<workdir>/<folder>/summary.json` marks it done.

  `open_run(config, workdir)` gives the run, or a UserError if some stage could
  not work with the config; `work(run, **flags)` the summary, which repeats the
  flags beside the config, and of which `table` is shown at the end.
  """
  workdir = paths.expanded(workdir)
  path = os.path.normpath(os.path.join(workdir, folder, 'summary.json'))
  if not _begin(name, config, path, workdir, flags):
    return
  with stopping.listening():
    check_stage(name, config, workdir)
    run = open_run(config, workdir)
    hosts.check_mesh(run.mesh)
    with lock.held(workdir, name):
      hosts.once(lambda: configs.claim_workdir(workdir, config))
      hosts.once(lambda: os.makedirs(os.path.dirname(path), exist_ok=True))
      hosts.check_shared(os.path.dirname(path))
      devices = f'{run.mesh.size} {jax.default_backend()} device(s)'
      if hosts.count() > 1:
        devices += f' of {hosts.count()} hosts'
      hosts.say(f'{name}: {config.model.name} on {devices}, into {workdir}')
      with saving.on_disk(workdir):
        summary = work(run, **flags)
        summary = {**summary, **flags, 'versions': environment.versions()}
        if hosts.first():
          files.write_json(path, summary)
          show.table(table(summary), f'{name}: done, see {path}')
    stopping.hear(hosts.gather(stopping.asked()))
    if stopping.due():  # no stage after it shall start
      raise stopping.stopped(name, None)
