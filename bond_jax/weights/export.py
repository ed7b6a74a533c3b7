"""The policy of a finished run, as a folder that others read."""

import os
import time
from typing import Any

from absl import flags
import jax
import ml_collections

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import lora, policies
from bond_jax.runs import command, environment, files, paths, show
from bond_jax.runs.settings import configs
from bond_jax.weights import load, official
from bond_jax.weights.gguf import layout
from bond_jax.weights.gguf import writer as gguf_writer
from bond_jax.weights.huggingface import adapter, reader, writer

FORMATS = ('hf', 'adapter', 'official', 'gguf')
DTYPES = 'bfloat16', 'float32', 'float16', 'q8_0'


def export(
  workdir: str, out: str, which: str, form: str, dtype: str, factor: float = 1.0
) -> dict[str, Any]:
  """Writes the policy of a run's train stage; returns the summary.

  Args:
    workdir: of the run.
    out: the folder to make.
    which: the checkpoint, 'last', 'best' or a step; 'reference' is what
      training started from.
    form: one of FORMATS.
    dtype: of the weights, with hf and gguf; others keep that of the run.
    factor: the policy is extrapolated by it; see `load.extrapolated`.
  """
  if '://' in out or os.path.lexists(out):
    why = 'is no local folder' if '://' in out else 'exists'
    raise UserError(f'--out={out} {why}; name a local one that does not exist.')
  load.check_factor(which, factor)
  if form == 'gguf':
    layout.library()
  config = configs.read_config(workdir)
  if 'tokenizer' not in config or 'model' not in config:
    raise UserError(f'{workdir} trains no language model: nothing to export.')
  _check_teacher(config, workdir, which)
  rank = config.model.lora.rank
  if form == 'adapter' and not rank:
    raise UserError(
      f'{workdir} was trained without LoRA: all its weights have changed;'
      ' export with --format=hf.'
    )
  # Of this machine, which need not be the one that trained.
  mesh = sharding.make_mesh(data=-1, model=1)
  sizes = None  # the tree is the gemma library's own
  if form != 'official' or not policies.is_library(config.model):
    sizes = policies.make_sizes(config.model, config.tokenizer.vocab_size)
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  frozen = None
  based = rank and form != 'adapter'
  if which == 'reference' or based or (factor != 1 and not rank):
    frozen = load.load_frozen(config, policy, workdir, mesh)
  if which == 'reference':
    trained, step = frozen.reference, 0
  else:
    trained = load.load_policy(config, policy, workdir, which, mesh, alone=True)
    trained = load.extrapolated(
      config, trained, frozen and frozen.reference, factor
    )
    step = load.find_step(workdir, 'train', which)
  params = frozen.base if based else trained
  if form == 'adapter':
    base = paths.expanded(config.get('weights') or '')
    base = base or configs.reference_dir(config, workdir)
    adapter.export_adapter(trained, sizes, out, base=base)
  elif form in ('hf', 'gguf'):
    kwargs = dict(
      dtype=dtype,
      tokenizer_path=tokenizer_path(config, workdir),
      lora=trained if rank else None,
      temperature=config.model.temperature,
    )
    if form == 'hf':
      source = source_of(config)
      writer.export(params, sizes, out, source=source, **kwargs)
    else:
      gguf_writer.export(params, sizes, out, **kwargs)
  else:
    params = lora.merge(sizes, params, trained) if rank else params
    official.save_official(params, sizes, out)
  return {
    'workdir': os.path.abspath(workdir),
    'model': config.model.name,
    'checkpoint': which,
    'extrapolated': factor,
    'step': step,
    'format': form,
    'parameters': sum(x.size for x in jax.tree.leaves(params)),
    'bytes': size_of(out),
  }


def _check_teacher(config, workdir: str, which: str) -> None:
  if which == 'reference' and config.teacher:
    raise UserError(
      f'the reference of {workdir} is its teacher {config.teacher}, which is'
      ' not exported from here; leave out --checkpoint=reference.'
    )


def tokenizer_path(config: ml_collections.ConfigDict, workdir: str) -> str:
  """The SentencePiece model of a run."""
  folder = configs.reference_dir(config, workdir)
  return config.tokenizer.path or os.path.join(folder, 'tokenizer.model')


def source_of(config: ml_collections.ConfigDict) -> str | None:
  """The Hugging Face folder that a run started from, if it is one."""
  path = paths.expanded(config.get('weights') or '')
  if os.path.isdir(path):
    return path if os.path.exists(os.path.join(path, 'config.json')) else None
  return reader.resolve(path) if '@' in path else None


def size_of(folder: str) -> int:
  """Bytes of all files below a folder."""
  return sum(
    os.path.getsize(os.path.join(where, name))
    for where, _, names in os.walk(folder)
    for name in names
  )


def main(
  workdir: str, out: str, which: str, form: str, dtype: str, factor: float = 1.0
) -> None:
  environment.configure_jax()
  start = time.perf_counter()
  print(f'export: {workdir}, checkpoint {which}, as {form}', flush=True)
  summary = export(workdir, out, which, form, dtype, factor)
  summary['seconds'] = round(time.perf_counter() - start, 3)
  summary['versions'] = environment.versions()
  path = os.path.join(out, 'summary.json')
  files.write_json(path, summary)
  show.table(show.scalars(summary), f'export: done, see {path}')


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  workdir = paths.flag('workdir', None, 'A finished run.', required=True)
  out = paths.flag('out', None, 'The folder to make.', required=True)
  which, factor = command.checkpoint_flag(), command.extrapolate_flag()
  form = flags.DEFINE_enum('format', 'hf', FORMATS, 'What others are to read.')
  dtype = flags.DEFINE_enum(
    'dtype', 'bfloat16', DTYPES, 'Of the weights, with hf and gguf.'
  )

  def export_it():
    started = configs.check_version(workdir.value)
    paths.go_to(paths.home(workdir.value, started))
    main(
      workdir.value, out.value, which.value, form.value, dtype.value,
      factor.value,
    )  # fmt: skip

  command.execute(export_it, doc)
