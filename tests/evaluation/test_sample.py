"""Completions on the terminal: whose, how many, and the best of them."""

import re

import pytest
import test_tokenizer
import toy

from bond_jax.errors import UserError
from bond_jax.evaluation import sample
from bond_jax.rewards import calling, make


@pytest.fixture
def config():
  return toy.get_config(toy.folder())


@pytest.fixture
def ask(monkeypatch, capsys):
  """Runs the command with these settings and lines; returns what it printed."""

  def ask(config, workdir, *lines, **asked):
    typed = iter(lines)
    capsys.readouterr()  # what was run before has printed, too

    def read(prompt):
      try:
        return next(typed)
      except StopIteration:
        raise EOFError from None

    monkeypatch.setattr('builtins.input', read)
    default = dict(prompt=None, n=1, best=False, checkpoint='last', seed=0)
    sample.from_run(config, workdir, **{**default, **asked})
    return capsys.readouterr().out

  return ask


def numbered(out):
  """The texts of '[1] ...', '[2] ...'; they may hold no line break."""
  rows = [re.fullmatch(r'\[(\d+)\] (.*)', line) for line in out.splitlines()]
  assert [int(row[1]) for row in rows] == list(range(1, len(rows) + 1))
  return [row[2] for row in rows]


def test_completions_are_numbered_and_depend_on_the_seed(config, ask):
  one = numbered(ask(config, toy.finished(), prompt='the film', n=8))
  assert len(one) == 8 and len(set(one)) > 4
  again = ask(config, toy.finished(), prompt='the film', n=8)
  assert numbered(again) == one
  other = ask(config, toy.finished(), prompt='the film', n=8, seed=1)
  assert numbered(other) != one
  alone = ask(config, toy.finished(), prompt='the film', n=1)
  assert alone.splitlines() == one[:1]


def test_the_checkpoint_that_is_asked_for(config, ask):
  texts = {
    which: ask(config, toy.finished(), prompt='a', n=8, checkpoint=which)
    for which in ('last', '3', '6', 'reference')
  }
  assert texts['last'] == texts['6']
  assert len(set(texts.values())) == 3
  with pytest.raises(UserError, match="checkpoint '5' is not in"):
    ask(config, toy.finished(), prompt='a', checkpoint='5')


def test_the_best_has_the_highest_reward(config, ask):
  texts = numbered(ask(config, toy.finished(), prompt='the film', n=8))
  reward = make.make_reward(config, config.reward, toy.finished())
  context = toy.context([texts])
  values = calling.call(reward, ['the film'], [texts], context)[0][0]
  out = ask(config, toy.finished(), prompt='the film', n=8, best=True)
  best = int(values.argmax())
  assert out.startswith(f'[{best + 1} of 8, reward {values[best]:.4g}, mean')
  assert out.rstrip('\n').endswith(f'] {texts[best]}')


def test_a_stop_string_ends_a_completion(config, ask):
  whole = numbered(ask(config, toy.finished(), prompt='the film', n=8))
  config.stop = ('e', 'wa')
  cut = numbered(ask(config, toy.finished(), prompt='the film', n=8))
  assert cut != whole
  for text, long in zip(cut, whole, strict=True):
    assert long.startswith(text)
    assert text == long or 'e' in text or 'wa' in text


def test_a_config_of_before_is_one_line(config, ask):
  with config.unlocked():
    del config.stop
  with pytest.raises(
    UserError, match="config has no 'stop', which must be a list"
  ):
    ask(config, toy.finished(), prompt='the film')


def test_openings_are_no_conversation(config, ask):
  with pytest.raises(UserError, match="this config has 'opening'; give --pro"):
    ask(config, toy.finished(), 'hello')


def test_a_conversation_goes_on(config, ask, monkeypatch):
  config.prompt.kind = 'turn'
  seen = []
  tokenizer = test_tokenizer.with_turns()

  def draw(row, pieces, n, seed):
    seen.append((pieces, seed, row))
    return [row['messages'][-1]['content']], [[f'answer {len(seen)}']], None

  monkeypatch.setattr(sample, 'open_run', lambda *args: (tokenizer, draw))
  out = ask(config, '', 'hello', 'and?', '', 'never said', seed=5)
  assert 'answer 1\n' in out and 'answer 2\n' in out
  assert [seed for _, seed, _ in seen] == [5, 6]
  messages = [
    {'role': 'user', 'content': 'hello'},
    {'role': 'assistant', 'content': 'answer 1'},
    {'role': 'user', 'content': 'and?'},
  ]
  assert [row['messages'] for _, _, row in seen] == [messages[:1], messages]
  chat = test_tokenizer.tokenizer.chat
  assert seen[1][0] == chat(tokenizer, messages, system=False)
  assert seen[0][0] == chat(tokenizer, messages[:1], system=False)
