"""Each command opens each split of the data once."""

import collections

from conftest import core
import pytest
import toy

from bond_jax.data import sources

SPLITS = {'train': 1, 'validation': 1, 'test': 1}


@pytest.mark.parametrize(
  'stage', core(3, ['sft', 'reward_model', 'evaluate', 'train'])
)
def test_a_command_opens_each_split_once(tmp_path, monkeypatch, stage):
  workdir, opened, source = str(tmp_path), collections.Counter(), sources.source
  if stage in ('train', 'evaluate'):
    toy.before(stage, workdir)

  def counting(name, split, **kwargs):
    opened[split] += 1
    return source(name, split, **kwargs)

  monkeypatch.setattr(sources, 'source', counting)
  toy.run(stage, toy.get_config(toy.folder()), workdir)
  assert opened == SPLITS
