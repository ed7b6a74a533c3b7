"""The benchmark: its arithmetic, and that our worker answers."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import arithmetic, bench, head, large, peers, tables, workloads
from bond_jax.models.gemma import model as gemma

TINY = workloads.Workload('tiny', 2, 2, 5, 3)


def test_a_ratio_is_the_median_over_rounds_not_of_medians():
  assert arithmetic.ratio([1, 10, 6], [2, 10, 3]) == 1
  assert arithmetic.geometric_mean([1, 4]) == pytest.approx(2)


def test_the_order_alternates_and_calls_are_long_enough():
  assert arithmetic.order('abc', 0) == ['a', 'b', 'c']
  assert arithmetic.order('abc', 1) == ['c', 'b', 'a']
  assert [arithmetic.repeats(x, 0.5) for x in (0.2, 0.5, 7.0)] == [3, 1, 1]


def test_completed_tokens_are_those_up_to_the_first_stop():
  rows = np.array([[5, 9, 5, 8], [5, 5, 5, 5], [9, 8, 9, 9], [5, 5, 5, 8]])
  assert workloads.lengths(rows, (8, 9)) == [2, 4, 1, 4]
  assert workloads.lengths(rows, ()) == [4, 4, 4, 4]
  assert arithmetic.stop_rate([2, 4, 1, 4], 4) == pytest.approx(2 / 11)


def test_busy_slots_by_hand():
  """Two slots: 3 and 1, then 2 follows the 1; or 3 + 1 wait for each other."""
  assert arithmetic.busy([3, 1, 2, 2], 2, refill=False) == 8 / (2 * (3 + 2))
  assert arithmetic.busy([3, 1, 2, 2], 2, refill=True) == 8 / (2 * 5)
  assert arithmetic.busy([3, 1, 2], 2, refill=True) == 6 / (2 * 3)


def test_prompts_hold_no_stop_and_are_read_as_they_are_written():
  rows = workloads.tokens(workloads.MIX)
  assert rows.shape == (512, 32) and not np.isin(rows, workloads.STOP_IDS).any()
  assert len(workloads.STOP_IDS) * 64 == workloads.VOCAB
  assert workloads.ids(workloads.text(rows[0])) == rows[0].tolist()
  parts = workloads.batches(workloads.MIX, rows)
  assert [len(x) for x in parts] == [32] * 16
  np.testing.assert_array_equal(np.concatenate(parts), rows)
  assert len(workloads.batches(TINY, rows)) == 1


def test_the_tables():
  rate = lambda *x: dict(rate=list(x), seconds=[1 / r for r in x], lengths=[])
  row = dict(
    ours=rate(10, 20, 30), gemma=rate(5, 20, 10), tunix=dict(skipped='why')
  )
  assert tables.ratios(row) == {'gemma': 2}
  assert tables.rates(row)['ours'] == 20 and tables.rates(row)['tunix'] is None
  lines = tables.sampling({'batch 8': row}).splitlines()
  assert lines[2] == '| batch 8 | 20 | 10 | n/a | n/a | 2 | n/a | n/a | 2 |'
  assert arithmetic.markdown([('a', 'b'), (1234.6, 0.01234)]) == (
    '| a | b |\n| --- | --- |\n| 1,235 | 0.0123 |'
  )
  parts = ('rollout', 'weigh', 'update', 'move_anchor')
  steps = {x: dict(ours=rate(8.0, 8.0)) for x in parts}
  steps['step'] = dict(ours=rate(1.0, 2.0), tunix=rate(1.0, 1.0))
  text = tables.step(steps)
  assert '| sum of its parts | 500 | 1.5 |' in text
  assert '| Tunix GRPO step | 1,000 | 0.75 |' in text
  row = dict(ours=rate(9.0, 8.0), transformers=rate(3.0, 4.0))
  text = tables.real({x: {'batch 1': row} for x in ('float32', 'bfloat16')})
  assert '| batch 1 | bfloat16 | 8.5 | 3.5 | 2.5 |' in text


def test_what_a_device_could_do_by_hand():
  config = gemma.Config(
    vocab_size=7, features=4, layers=2, heads=2, kv_heads=1, head_size=4,
    feed_forward=5, pattern=('local', 'global'), window=2,
  )  # fmt: skip
  # Of a layer: queries, keys and values, output, gates, down, two norms.
  layer = 2 * 4 * 4 + 2 * 4 * 4 + 2 * 4 * 4 + 2 * 4 * 5 + 5 * 4 + 2 * 4
  body = 2 * layer + 4
  assert large.size(config) == body + 7 * 4
  assert [large.contexts(config, at) for at in range(4)] == [2, 4, 5, 6]
  # Two new tokens after two: the cache of (2 + 3) and (2 + 4) positions.
  expected = 2 * (body + 28) * 2 + 3 * (2 * 4 * 2) * (5 + 6)
  assert large.sample_bytes(config, 3, 2, 2) == expected
  attention = 2 * 2 * 4 * (2 + 4 + 5 + 6)
  expected = 6 * 3 * (4 * body + 2 * 28 + attention)
  assert large.train_flops(config, 3, 2, 2) == expected


def test_the_head_agrees_with_the_plain_one():
  found = head.measure(8, 1, rows=2, length=33, vocab=50)
  assert found['gap']['log_prob'] < 1e-5 and found['gap']['gradient'] < 1e-4
  assert len(found['ours']['seconds']) == 1 and found['plain']['temporary'] > 0
  params, tokens = head.inputs(8, 2, 33, 50)
  law = head.plain_log_probs(params, tokens)
  shape = jnp.exp(law)
  assert law.shape == (2, 33) and ((shape > 0) & (shape < 1)).all()


@pytest.mark.long
def test_our_worker_answers(tmp_path):
  """Also that one which fails says why, and goes on."""
  workers, skipped = peers.start(['ours'], str(tmp_path))
  worker = workers['ours']
  assert not skipped and worker.hello['versions']['jax']
  answer = worker.measure('sample', TINY, 2, 0)
  assert answer['lengths'] == [3] * 4 and answer['tokens'] == 24
  assert answer['seconds'] > 0
  mix = TINY._replace(prompts=6, new_tokens=40, stop=True, slots=2)
  answer = worker.measure('sample', mix, 1, 0)
  assert len(answer['lengths']) == 12
  assert all(1 <= x <= 40 for x in answer['lengths'])
  assert min(answer['lengths']) < 40
  with pytest.raises(peers.Unavailable, match='KeyError'):
    worker.measure('nothing', TINY, 1, 0)
  found = bench.rounds_of(workers, ('sample',), TINY, 2)['sample']
  assert [len(found['ours'][x]) for x in ('seconds', 'rate')] == [2, 2]
  worker.close()


def test_a_peer_that_cannot_run_is_skipped_with_its_last_word(
  tmp_path, monkeypatch, capsys
):
  def no(name):
    raise peers.Unavailable('no network')

  monkeypatch.setattr(peers, 'environment', no)
  workers, skipped = peers.start(['tunix'], str(tmp_path))
  assert workers == {} and skipped == {'tunix': 'no network'}
  assert 'Tunix is skipped: no network' in capsys.readouterr().out


def test_an_unknown_section_is_refused(capsys):
  with pytest.raises(SystemExit):
    bench.parse(['--only=sampling,fast'])
  assert 'got fast' in capsys.readouterr().err
  assert json.dumps(bench.parse([]).only) == '["sampling", "step", "head"]'
