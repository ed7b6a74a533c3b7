"""Stored completions: what is read of a row, and which ones a step sees."""

import collections

import numpy as np
import pytest
import test_tokenizer

from bond_jax.data import examples, stored
from bond_jax.errors import BadRow

TOK = test_tokenizer.with_turns()
LENGTH = 12
ROW = {
  'text': 'the', 'completions': ['a film', 'good', 'a'],
  'rewards': [0.5, -1, 2.25], 'finished': [True, False, True],
}  # fmt: skip


def read(row, end=TOK.end_of_turn, stop=(), length=LENGTH, least=2):
  make = stored.reader(TOK, end=end, stop=stop, length=length, least=least)
  return make(row)


def test_a_row_is_read():
  found = read(ROW)
  film, good, a = map(TOK.encode, ROW['completions'])
  assert found.pieces == [[*film, TOK.end_of_turn], good, [*a, TOK.end_of_turn]]
  assert found.reward.dtype == np.float32
  assert found.reward.tolist() == [0.5, -1, 2.25]
  assert read(ROW, end=1).pieces[2] == [*a, 1]


@pytest.mark.parametrize('finished', [{}, {'finished': None}])
def test_without_the_flags_all_are_finished(finished):
  row = {k: x for k, x in ROW.items() if k != 'finished'} | finished
  assert all(y[-1] == TOK.end_of_turn for y in read(row).pieces)


def test_a_text_that_ends_completions_is_an_end():
  row = ROW | {'completions': ['so. ', 'so. ', 'so'], 'finished': [True] * 3}
  one, _, other = read(row, stop=('. ',)).pieces
  assert one == TOK.encode('so. ')
  assert other == [*TOK.encode('so'), TOK.end_of_turn]


def test_one_that_was_cut_is_cut_where_it_was():
  long = 'a film good ' * 9
  assert len(TOK.encode(long)) > LENGTH
  row = ROW | {'completions': [long] * 3, 'finished': [False] * 3}
  assert read(row).pieces == [TOK.encode(long)[:LENGTH]] * 3


def test_an_empty_one_may_have_ended_at_once():
  found = read(ROW | {'completions': ['', 'a', 'a']})
  assert found.pieces[0] == [TOK.end_of_turn]


def test_one_as_long_as_may_be():
  size = len(TOK.encode('a film')) + 1
  read(ROW | {'completions': ['a film'] * 3}, length=size)
  with pytest.raises(BadRow, match=rf'has {size} tokens, its end included'):
    read(ROW | {'completions': ['a film'] * 3}, length=size - 1)


@pytest.mark.parametrize('change, says', [
  ({'completions': None}, '"completions"; it is None. python -m bond_jax.draw'),
  ({'completions': 'a b'}, "a list \"completions\"; it is 'a b'"),
  ({'rewards': None}, 'a list "rewards"'),
  ({'rewards': 1.0}, 'a list "rewards"; it is 1.0'),
  ({'completions': [[3, 5], [4], [5]]},
   r'completions\[0\] is \[3, 5\]; it must be a text; tokens cannot'),
  ({'completions': [3, 5, 4]}, r'completions\[0\] is 3; it must be a text'),
  ({'rewards': [1, 2]}, '3 completions, 2 rewards and 3 finished'),
  ({'rewards': [1, 2], 'finished': None}, '3 completions, 2 rewards; give'),
  ({'finished': [True]}, '3 completions, 3 rewards and 1 finished'),
  ({'finished': [1, 0, 1]}, r'finished\[0\] is 1; it must be true or false'),
  ({'finished': 'yes'}, "a list \"finished\"; it is 'yes'"),
  ({'rewards': [1, float('nan'), 2]}, r'rewards\[1\] is nan; it must be'),
  ({'rewards': [1, 2, float('inf')]}, r'rewards\[2\] is inf'),
  ({'rewards': [1e39, 2, 3]}, r'rewards\[0\] is 1e\+39'),
  ({'rewards': [1, 2, -(10**400)]}, r'rewards\[2\] is -10000'),
  ({'rewards': [1, True, 2]}, r'rewards\[1\] is True; it must be a number'),
  ({'rewards': [1, '2', 2]}, r"rewards\[1\] is '2'; it must be a number"),
  ({'rewards': [[1], [2], [3]]}, r'rewards\[0\] is \[1\]; it must be a number'),
  ({'completions': ['a'], 'rewards': [1], 'finished': [True]},
   'a row has 1 completions, and the algorithm looks at 2'),
  ({'completions': ['a', '', 'b'], 'finished': None},
   r'completions\[1\] is empty'),
  ({'completions': ['a', '', 'b']}, r'completions\[1\] is empty'),
  ({'completions': ['a film ' * 9] * 3}, r'completions\[0\] has \d+ tokens'),
  ({'completions': ['a', 'a<end_of_turn>', 'b']},
   rf'completions\[1\] has the token {TOK.end_of_turn}, which ends'),
])  # fmt: skip
def test_what_cannot_be_read_is_told_in_a_line(change, says):
  with pytest.raises(BadRow, match=says) as e:
    read(ROW | change)
  assert '\n' not in str(e.value)


def test_a_row_of_an_evaluation_is_told_what_is_missing():
  with pytest.raises(
    BadRow, match='"completions"; it has text, completion. py'
  ):
    read({'text': 'a', 'completion': 'b'})


def test_a_row_is_usable_if_both_can_be_read():
  encode = {'the': [2, 7], 'long': None}.__getitem__
  make = stored.usable(
    lambda row: read(row, length=LENGTH), lambda row: encode(row['text'])
  )
  assert make(ROW) == [2, 7]
  assert make(ROW | {'text': 'long'}) is None
  with pytest.raises(BadRow, match='give as many'):
    make(ROW | {'text': 'long', 'rewards': [1]})


ROWS = [
  {'completions': [f'{"a" * (k + 1)}' for k in range(n)],
   'rewards': [10.0 * i + k for k in range(n)]}
  for i, n in enumerate((3, 5, 4))
]  # fmt: skip


def draw(visit, ids=(2, 0, 1), num=3, seed=7):
  prompts = examples.padded(ids, [[2, 5]] * len(ids), 2)
  return stored.draw(
    ROWS, read, prompts, num=num, length=LENGTH, seed=seed, visit=visit
  )


def test_completions_come_with_their_rewards():
  rollout, reward = draw(0)
  assert rollout.completion.shape == rollout.mask.shape == (3, 3, LENGTH)
  assert rollout.completion.dtype == np.int32 and reward.dtype == np.float32
  assert not rollout.log_prob.any() and rollout.log_prob.shape == (3, 3, LENGTH)
  assert not rollout.slot_steps.any() and rollout.slot_steps.shape == (3, 3)
  for b, i in enumerate((2, 0, 1)):
    assert len({*reward[b]}) == 3
    for k, value in enumerate(reward[b]):
      place = ROWS[i]['rewards'].index(value)
      there = rollout.completion[b, k][rollout.mask[b, k]].tolist()
      assert there == read(ROWS[i]).pieces[place]
      assert not rollout.completion[b, k][~rollout.mask[b, k]].any()


def test_a_visit_draws_the_same_again_in_any_batch():
  jax_like = lambda x, y: [np.testing.assert_array_equal(a, b)
                           for a, b in zip(x, y)]  # fmt: skip
  one, other = draw(3), draw(3)
  jax_like((*one[0], one[1]), (*other[0], other[1]))
  alone = draw(3, ids=(1,))
  jax_like([x[2:] for x in (*one[0], one[1])], (*alone[0], alone[1]))


def test_visits_seeds_and_prompts_draw_others():
  rewards = lambda *args, **kw: tuple(draw(*args, **kw)[1][2].tolist())
  assert len({rewards(visit) for visit in range(20)}) > 10
  assert len({rewards(0, seed=seed) for seed in range(20)}) > 10
  orders = {tuple(stored.order(0, 0, i, 5)) for i in range(20)}
  assert len(orders) > 10


def test_each_set_in_each_order_is_as_likely():
  count = collections.Counter(
    tuple(draw(visit, ids=(0,), num=2)[1][0]) for visit in range(3000)
  )
  assert len(count) == 6  # ordered pairs of three
  # Each is binomial of 3000 and 1/6, with a deviation of 20.
  assert all(abs(x - 500) < 90 for x in count.values())
