"""The smallest run of the language that can be enumerated."""

import importlib.util
import os

import ml_collections
import toy

PROMPTS, VOCAB, LENGTH = 2, 3, 2  # seven completions of each prompt

LEARNED = dict(
    n=2, backward_weight=0.5, drift_weight=0.0, num_policy=4,
    quantile='learned', num_quantile=8, zero='half', second_term=False,
    anchor='fixed',
)  # fmt: skip


def full_config(argument: str) -> ml_collections.ConfigDict:
  """What configs/enumerable.py says."""
  path = os.path.join(toy.ROOT, 'configs', 'enumerable.py')
  spec = importlib.util.spec_from_file_location('enumerable_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(argument)


def get_config(name: str, **args) -> ml_collections.ConfigDict:
  """The same at the size of a test, for an algorithm; saves every 4 steps."""
  config = full_config('algorithm=jbond')
  config.enumerable.update(dict(prompts=PROMPTS, vocab=VOCAB))
  config.length, config.chunk = LENGTH, 4096
  config.model.sizes.update(
      dict(features=16, layers=1, heads=2, kv_heads=1, head_size=8,
           feed_forward=32)
  )  # fmt: skip
  with config.unlocked():
    config.algorithm = dict(name=name, args=args)
  config.train.update(dict(steps=8, batch=8, save_every=4))
  config.train.optimizer.update(toy.OPTIMIZER)
  return config
