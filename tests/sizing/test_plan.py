"""The plan of a run, by the compilers of CPUs and of TPUs."""

import dataclasses
import os
import re
import subprocess
import sys

from conftest import TINY
import jax
from jax.experimental import topologies
import pytest
import toy

from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.sizing import chips, plan, programs
from bond_jax.weights import official
from configs import gemma_jbond

PROGRAMS = ['rollout', 'weigh', 'update', 'move_anchor', 'probe/draw',
            'probe/score']  # fmt: skip


LINUX = pytest.mark.skipif(
  sys.platform != 'linux' or os.uname().machine != 'x86_64',
  reason='libtpu is for Linux x86-64 alone',
)


def small(lora_rank=0, algorithm='jbond'):
  """A config of a tiny model, its weights, data and rewards unset."""
  config = gemma_jbond.get_config(
    'gemma2_2b', vocab_size=256, learning_rate=1e-3, lora_rank=lora_rank
  )
  sizes = dataclasses.asdict(TINY['gemma2']) | dict(
    vocab_size=256, features=128, layers=3, heads=4,
    feed_forward=256, head_size=32, window=64,
  )  # fmt: skip
  for name in ('used_vocab', 'lora_scale'):  # which follow from other settings
    del sizes[name]
  with config.unlocked():
    config.model.sizes = sizes
    config.prompt.length, config.length = 8, 8
    config.train.update(dict(batch=16, micro_batches=2, steps=1, buckets=1))
    config.train.probe_prompts = 16
    if algorithm == 'rloo':
      config.algorithm = dict(
        name='rloo', args=dict(num_policy=4, kl_weight=0.1)
      )  # fmt: skip
  return config


@pytest.fixture(scope='module')
def found():
  return plan.plan(small(), 'cpu:8')


@pytest.mark.long
def test_a_plan_counts_what_is_kept_beside_each_program(found):
  assert found['fits'] and list(found['programs']) == PROGRAMS
  kept = found['resident_bytes']
  assert set(kept) == {'parameters', 'optimizer', 'anchor', 'reference'}
  assert kept['anchor'] == kept['parameters'] == kept['reference']
  # Adam's two moments, and counters of a few bytes.
  assert 0 <= kept['optimizer'] - 2 * kept['parameters'] < 32
  assert not found['reference_on_chip']
  beside = {k: row['beside_bytes'] for k, row in found['programs'].items()}
  one, close = kept['parameters'], lambda n: pytest.approx(n, abs=64)
  assert beside['rollout'] == close(2 * one)  # the optimizer's
  assert beside['weigh'] == close(3 * one)  # all but the anchor
  assert beside['update'] <= 64 + one  # the anchor passes through it, or not
  assert beside['probe/draw'] == close(3 * one)
  assert beside['probe/score'] == close(4 * one)
  for row in found['programs'].values():
    whole = row['argument_bytes'] + row['beside_bytes'] + row['temporary_bytes']
    assert row['peak_bytes'] == whole
  for key in ('hbm_bytes', 'batch', 'prompt_length', 'max_new_tokens',
              'param_dtype', 'trainable'):  # fmt: skip
    assert found[key]
  assert found['peak_bytes'] == max(
    row['peak_bytes'] for row in found['programs'].values()
  )


@pytest.mark.long
def test_no_program_gathers_all_parameters_at_once(found):
  whole = 8 * found['resident_bytes']['parameters']
  for name, row in found['programs'].items():
    # The compiler for CPUs sums all gradients in one call.
    if name != 'update':
      assert row['largest_collective']['bytes'] < whole / 3


def test_adapters_are_small_and_their_base_is_kept():
  config = small(lora_rank=2)
  mesh = sharding.make_mesh(8, 1)
  _, kept = programs.of_config(config, mesh)
  size = {k: programs.bytes_of(v) for k, v in kept.items() if v != {}}
  assert size['base'] > 3 * size['parameters']


def test_a_reference_that_is_the_anchor_stays():
  config = small(algorithm='rloo')
  wanted, kept = programs.of_config(config, sharding.make_mesh(8, 1))
  assert kept['anchor'] == {}
  all_kept = sum(programs.bytes_of(v) for v in kept.values())
  assert wanted['update'].resident == pytest.approx(all_kept, abs=64)


def test_a_teacher_is_counted_in_its_own_sizes(monkeypatch):
  """By the name of a release, without its weights."""
  sizes = dataclasses.replace(
    TINY['gemma2'], vocab_size=256, features=256, layers=6, heads=8,
    feed_forward=512, head_size=32, window=64, used_vocab=None,
  )  # fmt: skip
  monkeypatch.setitem(gemma.CONFIGS, 'large', sizes)
  monkeypatch.setitem(official.RELEASES, 'large_it', 'gs://nowhere/at/all')
  config, mesh = small(algorithm='rloo'), sharding.make_mesh(8, 1)
  alone, kept_alone = programs.of_config(config, mesh)
  config.teacher = 'large_it'
  plan.check(config, mesh)
  wanted, kept = programs.of_config(config, mesh)
  assert [*wanted] == [*PROGRAMS, 'probe/draw_teacher'] != [*alone]
  shapes = jax.eval_shape(lambda: gemma.init(sizes, jax.random.key(0)))
  count = sum(x.size for x in jax.tree.leaves(shapes))
  size = {k: programs.bytes_of(v) for k, v in kept.items()}
  before = {k: programs.bytes_of(v) for k, v in kept_alone.items()}
  whole = 2 * count / 8  # in bfloat16; norms are on every chip
  assert whole <= size['reference'] <= 1.1 * whole
  assert before | {'reference': 0} == size | {'reference': 0}
  more = size['reference'] - before['reference']
  for name in ('rollout', 'weigh', 'update'):
    assert wanted[name].resident - alone[name].resident == more
  beside = size['reference'] + size['parameters']
  assert wanted['probe/draw_teacher'].resident == beside
  config = small()
  config.teacher = 'large_it'
  with pytest.raises(UserError, match='jbond looks at its anchor alone'):
    plan.check(config, mesh)


def test_what_does_not_fit_is_said_with_what_to_try():
  kept = 2**20
  found = dict(
    resident_bytes=dict(parameters=kept, optimizer=2 * kept, reference=kept),
    programs={name: dict(peak_bytes=6 * kept) for name in PROGRAMS},
    reference_on_chip=False, hbm_bytes=8 * kept, too_much={}, slots=0,
    batch=16, micro_batches=2,
  )  # fmt: skip
  assert plan.verdict(dict(found, fits=True)).startswith('fits: at most 0.01 ')
  said = plan.verdict(dict(found, fits=False, hbm_bytes=5 * kept))
  assert said.startswith('does not fit: ')
  over = dict(found, fits=False, too_much={'update': 16.3 * 2**30})
  said = plan.verdict(over)
  assert (
    'update needs 16.30 GiB or more' in said and 'train.micro_batches=4' in said
  )
  over = dict(found, fits=False, hbm_bytes=kept, too_much={'rollout': 0.0})
  assert 'more chips' in plan.verdict(over) and 'LoRA' in plan.verdict(over)


@pytest.mark.parametrize('limit', [1, 2, 5, 37])
def test_the_largest_batch_is_found(monkeypatch, limit):
  """To within a factor of two; micro-batches keep their size."""
  tried = []

  def fake(config, topology):
    n = config.train.batch
    assert n == 8 * config.train.micro_batches
    tried.append(n)
    return dict(batch=n, fits=n <= 8 * limit, too_much={}, hbm_bytes=1,
                programs={'update': dict(peak_bytes=n)}, slots=0,
                resident_bytes={}, micro_batches=1,
                reference_on_chip=False)  # fmt: skip

  monkeypatch.setattr(plan, 'plan', fake)
  best = plan.search(small(), 'cpu:8')['batch'] // 8
  assert best <= limit < 2 * best
  assert len(tried) == len(set(tried)) <= 8


@pytest.mark.parametrize(
  'topology, says',
  [
    ('v5e:3x5', 'knows no such slice .* known are'),
    ('v9:2x2', 'known are v4, v5e, v5p, v6e'),
    ('v5litepod-16', 'v5e:4x4'),
    ('v5e', 'with the chips of a slice by their grid'),
    ('cpu:none', 'cpu with a number: .* cpu:8'),
    ('cpu:9', 'has 8 CPU devices'),
  ],
)
def test_unknown_devices(topology, says):
  jax.devices()  # their number is decided here
  with pytest.raises(UserError, match=says):
    chips.devices(topology)


def test_without_the_compiler(monkeypatch):
  monkeypatch.setattr(chips.os.path, 'exists', lambda path: False)
  with pytest.raises(UserError, match='libtpu, is not installed: "make setup"'):
    chips.devices('v5e:2x2')


@pytest.mark.long
@LINUX
def test_the_tpu_compiler():
  """A tiny model fits, and there are times."""
  config = small()
  found = plan.plan(config, 'v5e:2x2')
  assert found['fits'] and found['chips'] == 4
  assert found['hbm_bytes'] == 15.75 * 2**30
  for name in PROGRAMS[:4]:
    least = found['programs'][name]['least_seconds']
    assert max(least.values()) > 0
  sent = found['programs']['update']['collectives']
  assert sum(x['bytes'] for x in sent.values()) > 0


@pytest.mark.long
@LINUX
def test_the_command_without_a_run_s_data(tmp_path):
  """All weights of Gemma 2B, and Adam, are too much for one chip."""
  out = str(tmp_path / 'plan')
  done = subprocess.run(
    [sys.executable, '-m', 'bond_jax.plan', '--topology=v5e:1x1',
     '--config=configs/gemma_2b_jbond.py', f'--out={out}'],
    cwd=toy.ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  said = done.stdout.splitlines()[-1]
  assert said.startswith('does not fit: move_anchor needs 46.')
  assert 'try more chips, ' in said
  assert out in said
  found = toy.summary(out)
  assert not found['fits'] and found['peak_bytes'] is None
  assert set(found['too_much']) >= {'rollout', 'update'}
  assert re.fullmatch(r'0\.0\.\d+(\.\d+)?', found['versions']['libtpu'])


def test_only_plans_of_tpus_have_the_tpu_compiler():
  assert chips.compiler('cpu:8') == {}


@LINUX
def test_slices_have_whole_parts_of_the_data_axis():
  """So that only gradients and their like cross the slower network."""
  chips.devices('v5e:2x2')  # finds the compiler
  devices = topologies.get_topology_desc(
    platform='tpu', topology_name='v5e:2x2', num_slices=2
  ).devices
  mesh = sharding.make_mesh(-1, 2, devices=list(devices))
  assert dict(mesh.shape) == {'data': 4, 'model': 2}
  slices = [[d.slice_index for d in row] for row in mesh.devices]
  assert slices == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(UserError, match='2 slices, which split `data`'):
    sharding.make_mesh(1, 8, devices=list(devices))


@pytest.mark.long
@pytest.mark.parametrize('end, status, says', [
  ('os.abort()', 2, 'error: the compiler was ended by SIGABRT in the program'),
  ('sys.exit(7)', 7, ''),
])  # fmt: skip
def test_a_compiler_that_aborts_is_one_line(tmp_path, end, status, says):
  (tmp_path / 'config.py').write_text(f'import os, sys\n{end}\n')
  done = subprocess.run(
    [sys.executable, '-m', 'bond_jax.plan', '--topology=cpu:1',
     f'--config={tmp_path}/config.py', f'--out={tmp_path}/out'],
    cwd=toy.ROOT, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == status
  ours = [x for x in done.stderr.splitlines() if x.startswith('error: ')]
  assert len(ours) == bool(says)
  assert all(x.startswith(says) for x in ours)


ROLLOUT = """
import jax
from bond_jax.devices import sharding
from bond_jax.sizing import chips, programs
from configs import gemma3_1b_jbond

jax.config.update('jax_platforms', 'cpu')
config = gemma3_1b_jbond.get_config()
config.sampling_mesh.model, config.tokenizer.vocab_size = 1, 1024
config.length = 8
with config.unlocked():
  config.model.sizes, config.train.steps = dict(layers=1, vocab_size=1024), 1
mesh = sharding.make_mesh(**config.mesh, devices=chips.devices('v5e:2x2')[0])
programs.compile_program(programs.of_config(config, mesh)[0]['rollout'])
"""


@LINUX
@pytest.mark.long
def test_a_sampler_that_gathers_its_weights_compiles():
  """The compiler aborted where a feed-forward layer read rows as one axis."""
  done = subprocess.run(
    [sys.executable, '-c', ROLLOUT], cwd=toy.ROOT, capture_output=True,
    text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-2000:]
