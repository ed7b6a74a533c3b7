"""The model that all samplers run, written for each of them.

    python -m benchmarks.tiny FOLDER [MODEL]

`gemma3_tiny` with random weights: weights.npz with the gemma library's names,
and a Hugging Face folder. The final norm is scaled down until the logits are
nearly uniform, so that a set of stop ids has the probability that it should.
With a name, the Hugging Face configuration of that model and no weights.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from bond_jax.models.gemma import model as gemma
from bond_jax.weights import stacks
from bond_jax.weights.huggingface import config_json, writer

CONFIG = gemma.CONFIGS['gemma3_tiny']


def params():
  """Float32, the same in every process."""
  tree = jax.jit(lambda key: gemma.init(CONFIG, key))(jax.random.key(0))
  scale = jnp.full_like(tree['final_norm']['scale'], workloads.LOGIT_SCALE - 1)
  return tree | {'final_norm': {'scale': scale}}


def write(folder: str) -> None:
  tree = params()
  arrays = {k: np.asarray(v) for k, v in stacks.nested(CONFIG, tree)}
  os.makedirs(folder, exist_ok=True)
  np.savez(os.path.join(folder, 'weights.npz'), **arrays)
  path = os.path.join(folder, 'huggingface')
  if not os.path.exists(path):
    writer.export(tree, CONFIG, path, dtype='float32')


def write_config(folder: str, model: str) -> None:
  path = os.path.join(folder, model)
  os.makedirs(path, exist_ok=True)
  described = config_json.to_json(gemma.CONFIGS[model], 'bfloat16')
  with open(os.path.join(path, 'config.json'), 'w') as f:
    json.dump(described, f)


if __name__ == '__main__':
  (write_config if sys.argv[2:] else write)(*sys.argv[1:])
