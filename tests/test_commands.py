"""Every command of README.md and docs/ is run; command_rules.py says how."""

import re

import command_rules
import commands
import pytest
from test_pages import pages

FOUND = {name: commands.commands(text) for name, text in pages().items()}
PAGES = sorted(name for name, found in FOUND.items() if found)
# Each needs the demo's run, which is made once for all of them.
DEMO = ('README.md', 'docs/data.md', 'docs/tutorial.md',
        'docs/choosing_hyperparameters.md', 'docs/troubleshooting.md',
        'docs/weights.md')  # fmt: skip


@pytest.mark.parametrize('name', PAGES)
def test_every_command_has_a_rule(name):
  for command in FOUND[name]:
    assert command_rules.rule(command)


def test_the_rules_are_all_in_use():
  """A rule that nothing needs hides what it does not run."""
  used = set()
  for found in FOUND.values():
    for command in found:
      used |= {next(p for p, _ in command_rules.RULES if re.match(p, command))}
  assert used == {pattern for pattern, _ in command_rules.RULES}


def test_a_command_without_a_rule_is_found():
  page = '```bash\npython -m bond_jax.sft \\\n  --x=1  # why\nrm -rf /\n```\n'
  first, second = commands.commands(page)
  assert first == 'python -m bond_jax.sft --x=1'
  assert command_rules.rule(first)
  with pytest.raises(AssertionError, match='no rule .* rm -rf'):
    command_rules.rule(second)


def test_indented_commands_and_strange_blocks_are_found():
  text = 'So:\n\n    PYTHONPATH=. python x.py\n\n    {"a": 1}\n\nand on\n'
  assert commands.commands(text) == ['PYTHONPATH=. python x.py']
  with pytest.raises(AssertionError, match='is not bash'):
    commands.commands('```sh\nmake demo\n```\n')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
  made = commands.Place(tmp_path_factory.mktemp('repository'))
  yield made
  made.close()


def grouped(name):
  group = 'demo' if name in DEMO else 'others'
  return pytest.param(name, marks=pytest.mark.xdist_group(group))


@pytest.mark.slow
@pytest.mark.parametrize('name', [grouped(name) for name in PAGES])
def test_the_commands_of_a_page_work(place, name):
  for command in FOUND[name]:
    command_rules.rule(command)(place, command)
