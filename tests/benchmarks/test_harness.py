"""What of the harness is ours: its arguments, and the table of its results.

tests/parity/test_lm_eval.py runs the harness itself.
"""

import json
import os

import pytest

from benchmarks import harness
from bond_jax.errors import UserError

SETTINGS = dict(chat=False, batch='8', device='cpu', limit=0, include='')


def arguments(task='gsm8k', **settings):
  return harness.arguments('m', task, 'out', **{**SETTINGS, **settings})


def after(args, flag):
  return args[args.index(flag) + 1]


def test_shots_are_the_leaderboard_s_or_the_task_s_own():
  for task, shots in (('gsm8k', '5'), ('hellaswag', '10'), ('mmlu', '5')):
    assert after(arguments(task), '--num_fewshot') == shots
  assert '--num_fewshot' not in arguments('arc_easy')


def test_what_was_asked_for_is_passed_on():
  args = arguments()
  at = args.index('--model_args')
  assert args[at + 1 : at + 4] == [
    'pretrained=m', 'dtype=auto', 'softmax_dtype=float32'
  ]  # fmt: skip
  assert not {'--limit', '--include_path', '--apply_chat_template'} & {*args}
  args = arguments(chat=True, limit=7, include='mine', device='cuda:0')
  assert after(args, '--limit') == '7'
  assert after(args, '--include_path') == 'mine'
  assert after(args, '--device') == 'cuda:0'
  assert after(args, '--fewshot_as_multiturn') == 'true'
  assert '--apply_chat_template' in args


def result(acc, error):
  row = {
    'alias': 'x',
    'acc,none': acc,
    'acc_stderr,none': error,
    'exact_match,strict-match': acc / 2,
    'exact_match_stderr,strict-match': 'N/A',
  }
  return {'results': {'x': row, 'x_part': {'acc,none': 0.0}}}


def test_a_table_of_before_and_after():
  found = {
    'x': {
      'reference': harness.scores(result(0.25, 0.01), 'x'),
      'policy': harness.scores(result(0.5, 0.02), 'x'),
    }
  }
  assert found['x']['policy'] == {
    'acc': (0.5, 0.02), 'exact_match (strict-match)': (0.25, None)
  }  # fmt: skip
  assert harness.table(found)[1:] == [
    ('x', 'acc', '25.00 ± 1.00', '50.00 ± 2.00', '+25.00'),
    ('x', 'exact_match (strict-match)', '12.50', '25.00', '+12.50'),
  ]
  lines = harness.markdown(harness.table(found)).splitlines()
  assert [line.count('|') for line in lines] == 4 * [6]


def test_results_that_are_there_are_read(tmp_path):
  """And not asked for again: there is no such model."""
  os.makedirs(tmp_path / 'model')
  path = tmp_path / 'model' / 'results_2026.json'
  path.write_text(json.dumps({'results': 3}))
  found = harness.judge('nowhere', 'x', str(tmp_path), **SETTINGS)
  assert found == {'results': 3}


def test_a_command_that_fails_is_told():
  with pytest.raises(UserError, match='json.tool ended with [12];'):
    harness.call('json.tool', '/nowhere')


def test_a_folder_of_other_settings_is_left_alone(tmp_path):
  os.makedirs(tmp_path / 'lm_eval')
  path = tmp_path / 'lm_eval' / 'summary.json'
  asked = dict(checkpoint='last', dtype='float32', **SETTINGS)
  path.write_text(json.dumps({'asked': {**asked, 'chat': True}}))
  with pytest.raises(UserError, match='chat: True -> False'):
    harness.main(str(tmp_path), ['x'], 'last', 'float32', **SETTINGS)
  assert os.listdir(tmp_path / 'lm_eval') == ['summary.json']


def test_turns_are_asked_for_where_the_folder_knows_them(tmp_path):
  with pytest.raises(UserError, match='has no chat template'):
    harness.check_template(str(tmp_path))
  described = tmp_path / 'tokenizer_config.json'
  described.write_text('{"bos_token": "<s>"}')
  with pytest.raises(UserError, match='has no chat template'):
    harness.check_template(str(tmp_path))
  described.write_text('{"chat_template": "{{ messages }}"}')
  harness.check_template(str(tmp_path))
  described.unlink()
  (tmp_path / 'chat_template.jinja').write_text('{{ messages }}')
  harness.check_template(str(tmp_path))
