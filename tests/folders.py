"""Hugging Face folders of the tiny models, to be read, damaged and compared."""

import dataclasses
import functools
import json
from unittest import mock

from conftest import random_params, TINY
import jax
import numpy as np

from bond_jax.devices import sharding
from bond_jax.weights import stacks
from bond_jax.weights.huggingface import config_json, reader, writer

CONFIGS = {
  **TINY,
  # Hugging Face writes query scales as 1 / sqrt(n).
  'gemma2': dataclasses.replace(TINY['gemma2'], query_scale=0.5),
}


def mesh_of(data=4, model=2):
  return sharding.make_mesh(data=data, model=model)


def like_of(config, mesh, dtype='float32'):
  shapes = stacks.init_shapes(config)
  return sharding.tree_structs(shapes, mesh, dtype)


@functools.cache
def params_of(name):
  """Random ones; the rows of the embedding that no token uses are zero."""
  config = CONFIGS[name]
  params = random_params(config, len(name))
  params['embedder']['input_embedding'][config.used_vocab :] = 0
  return config, params


def config_of(folder):
  """The model that a folder's config.json describes."""
  return config_json.from_json(
    reader.read_config(str(folder)), f'{folder}/config.json'
  )


def export(params, config, path, shard_bytes=10**9, **kwargs):
  with mock.patch.object(writer, 'SHARD_BYTES', shard_bytes):
    writer.export(params, config, str(path), **kwargs)


def exported(name, path, dtype='float32', **kwargs):
  config, params = params_of(name)
  export(params, config, path, dtype=dtype, **kwargs)
  return config, params


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def read(folder, name='config.json'):
  return json.loads((folder / name).read_text())


def change(folder, name='config.json', **values):
  (folder / name).write_text(json.dumps({**read(folder, name), **values}))
