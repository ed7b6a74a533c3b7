"""Slow faults, found in rows that have them and in no others."""

import pytest

from bond_jax.training import watch

LIMITS = dict(
  kl=10.0, entropy=0.5, length=2.0, signal=0.05, speed=2.0, moves=True
)


def rows(count=60, **late):
  """Rows of a good run; `late` is what the last 20 of them hold instead."""
  good = {
    'loss': 1.0, 'kl/reference': 2.0, 'signal/fires': 0.3, 'skipped': 0.0,
    'anchor/drift': 0.01, 'entropy/token': 3.0, 'length/completion': 20.0,
    'seconds/sample': 1.0, 'seconds/update': 2.0,
  }  # fmt: skip
  found = [{'step': i + 1, **good} for i in range(count)]
  found[0]['seconds/update'] = 100.0  # compiles
  for row in found[-20:]:
    row.update({k.replace('__', '/'): v for k, v in late.items()})
  return found


def test_a_good_run_has_nothing():
  assert watch.look(rows(), **LIMITS) == {}
  assert watch.look([], **LIMITS) == {}
  assert watch.look([{'step': 1, 'loss': None}], **LIMITS) == {}


@pytest.mark.parametrize('late, name, says', [
  ({'kl__reference': 11.0}, 'kl', 'is 11.0 nats, above 10'),
  ({'entropy__token': 1.4}, 'entropy', '47% of what it was'),
  ({'entropy__token': 0.0}, 'entropy', '0% of what it was'),
  ({'length__completion': 41.0}, 'length', '2.0 times as long'),
  ({'length__completion': 9.0}, 'length', '0.5 times as long'),
  ({'signal__fires': 0.04}, 'signal', 'on 4.0% of prompts'),
  ({'anchor__drift': 0.0}, 'anchor', 'has not moved'),
  ({'seconds__sample': 5.0}, 'speed', '2.3 times as long'),
  ({'skipped': 0.1}, 'skipped', '2 of the last 20 steps'),
])  # fmt: skip
def test_what_is_wrong_has_its_name_and_its_advice(late, name, says):
  found = watch.look(rows(**late), **LIMITS)
  assert list(found) == [name] and says in found[name]
  assert found[name].endswith(f': {watch.ADVICE[name]}.')


@pytest.mark.parametrize('late', [
  {'kl__reference': 9.0}, {'entropy__token': 1.6}, {'length__completion': 39.0},
  {'length__completion': 11.0}, {'signal__fires': 0.06},
  {'seconds__sample': 3.5}, {'seconds__save': 900.0},
])  # fmt: skip
def test_what_is_within_the_limits_is_not(late):
  assert watch.look(rows(**late), **LIMITS) == {}


def test_what_is_not_known_or_not_asked_is_not_wrong():
  assert watch.look(rows(kl__reference=99.0), **LIMITS | {'kl': 0}) == {}
  still = rows(anchor__drift=0.0)
  assert watch.look(still, **LIMITS | {'moves': False}) == {}
  none = [{'step': i, 'loss': 1.0} for i in range(60)]
  assert watch.look(none, **LIMITS) == {}
  null = rows(entropy__token=None, length__completion=None, signal__fires=None)
  assert watch.look(null, **LIMITS) == {}


def test_the_first_rows_are_too_few_to_compare():
  assert watch.look(rows(40, signal__fires=0.0), **LIMITS) == {}
  assert list(watch.look(rows(41, signal__fires=0.0), **LIMITS)) == ['signal']
  # But not for what is wrong by itself.
  assert list(watch.look(rows(21, kl__reference=11.0), **LIMITS)) == ['kl']


def test_what_is_kept_is_enough():
  """Of a long run the first rows and the last, and the same is found."""
  run, seen = rows(300, signal__fires=0.0, entropy__token=1.0), []
  for i, row in enumerate(run):
    watch.keep(seen, row)
    assert watch.look(seen, **LIMITS) == watch.look(run[: i + 1], **LIMITS)
  assert [row['step'] for row in seen] == [*range(1, 22), *range(281, 301)]
