"""EleutherAI's harness on our folders: its log-probs and texts are ours."""

import dataclasses
import functools
import json
import os
import subprocess
import sys

os.environ['HF_HUB_OFFLINE'] = '1'  # this process asks nobody

from conftest import random_params
import jax
import numpy as np
import pytest
import toy
from turns import vocabulary

from benchmarks import harness
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.models import log_probs, sampling
from bond_jax.models.gemma import model as gemma
from bond_jax.models.stops import Stop
from bond_jax.runs.checkpoints import checkpoint
from bond_jax.types import Prompts, TrainState

pytest.importorskip('lm_eval', reason='needs requirements-hf.txt')

ENVIRONMENT = {'HF_DATASETS_OFFLINE': '1', 'PYTHONPATH': toy.ROOT}
WIDTH = 48  # of prompts and of completions, padded
ROWS = [
  dict(question='the film', choices=[' was good', ' was bad and long', ' it']),
  dict(question='everyone loved', choices=[' it', ' a story', ' 27 films']),
  dict(question='a  story is', choices=[' 1', ' 22', ' the story of a film']),
  dict(question='rare', choices=[' is good', ' good', 'ly']),
  dict(question='it is 27 minutes', choices=['\nlong', ' long', '.']),
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: PATH, train: PATH}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: PATH}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["9"], max_gen_toks: 16, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def sizes_of(tokenizer):
  """What --config.model.sizes may say of gemma3_tiny."""
  return dict(
    vocab_size=tokenizer.vocab_size, features=16, layers=3, heads=2,
    kv_heads=1, head_size=8, feed_forward=32, window=4,
  )  # fmt: skip


def model_of(tokenizer):
  return dataclasses.replace(
    gemma.CONFIGS['gemma3_tiny'], **sizes_of(tokenizer)
  )


@functools.cache
def params_of(tokenizer, seed):
  """Random, and less sure that a token is followed by itself."""
  params = random_params(model_of(tokenizer), seed)
  rows = params['embedder']['input_embedding']
  rows *= 0.5
  # Bytes that are no character would be written in other ways.
  rows[[tokenizer.processor.is_byte(i) for i in range(len(rows))]] = 0
  params['final_norm']['scale'] += 4
  return params


def leave(workdir, stage, params):
  """What a finished stage leaves."""
  os.makedirs(os.path.join(workdir, stage))
  with open(os.path.join(workdir, stage, 'summary.json'), 'w') as f:
    f.write('{}')
  with checkpoint.manager(os.path.join(workdir, stage, 'checkpoints')) as c:
    state = TrainState(np.int32(0), jax.device_put(params), {}, {}, {})
    checkpoint.save(c, 3, state, {}, 0.0)


def run_of(workdir, tokenizer, path):
  """A finished run whose reference and policy are unlike each other."""
  config = toy.get_config(toy.folder())
  config.model.name, config.model.sizes = 'gemma3_tiny', sizes_of(tokenizer)
  config.tokenizer.update(dict(path=path, vocab_size=tokenizer.vocab_size))
  leave(workdir, 'sft', params_of(tokenizer, 5))
  leave(workdir, 'train', params_of(tokenizer, 6))
  with open(os.path.join(workdir, 'config.json'), 'w') as f:
    f.write(config.to_json_best_effort())


def policy_of(tokenizer, temperature=1.0):
  return gemma.make(
    model_of(tokenizer), temperature=temperature, dtype='float32', scan=False,
    remat='none',
  )  # fmt: skip


def prompts_of(pieces):
  """One row, padded on the left to a width that all have."""
  pad = WIDTH - len(pieces)
  return Prompts(
    np.array([[0] * pad + pieces], np.int32), np.arange(WIDTH)[None] >= pad,
    np.zeros(1, np.int32), np.ones(1, np.float32),
  )  # fmt: skip


@functools.cache
def programs(tokenizer):
  """Log-probs, and greedy completions of 16 tokens, each compiled once."""

  def score(params, prompts, completion, mask):
    policy = policy_of(tokenizer)
    out = log_probs.log_probs(
      policy, params, prompts, completion, mask, chunk=64
    )
    return out.sum()

  def draw(params, prompts):
    return sampling.sample(
      policy_of(tokenizer, 0.0), params, prompts, jax.random.key(0),
      sampling.Limits(16, Stop(tokenizer.stop_ids)), num=1,
    )  # fmt: skip

  return jax.jit(score), jax.jit(draw)


def log_prob(tokenizer, params, context, continuation):
  """log pi(continuation | context), nats, of piece ids."""
  score, _ = programs(tokenizer)
  completion = np.zeros((1, 1, WIDTH), np.int32)
  completion[..., : len(continuation)] = continuation
  mask = np.arange(WIDTH)[None, None] < len(continuation)
  return float(score(params, prompts_of(context), completion, mask))


def greedy(tokenizer, params, context):
  _, draw = programs(tokenizer)
  drawn = draw(params, prompts_of(context))
  return np.asarray(drawn.completion)[np.asarray(drawn.mask)]


def ask(workdir, tasks, *args):
  """Runs the command as its users do; returns the summary."""
  env = {**os.environ, **ENVIRONMENT, 'HF_HOME': str(tasks / 'cache')}
  done = subprocess.run(
    [sys.executable, '-m', 'benchmarks.harness', f'--workdir={workdir}',
     f'--include={tasks}', '--dtype=float32', '--batch=3', *args],
    cwd=toy.ROOT, env=env, capture_output=True, text=True, check=False,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return toy.summary(os.path.join(workdir, 'lm_eval'))


def samples(workdir, side, task):
  """The rows that the harness has judged, in their order."""
  folder = os.path.join(workdir, 'lm_eval', side, task)
  (path,) = [
    os.path.join(where, name)
    for where, _, names in os.walk(folder)
    for name in names
    if name.startswith('samples_')
  ]
  with open(path) as f:
    rows = [json.loads(line) for line in f]
  return sorted(rows, key=lambda row: row['doc_id'])


@pytest.fixture(scope='module')
def found(tmp_path_factory):
  """A run, and tasks whose answers are the policy's own where they are even."""
  folder = tmp_path_factory.mktemp('lm_eval')
  tokenizer = tokenizer_lib.load(path := vocabulary(folder))
  workdir = str(folder / 'run')
  run_of(workdir, tokenizer, path)
  tasks = folder / 'tasks'
  tasks.mkdir()
  with open(tasks / 'rows.jsonl', 'w') as f:
    for i, row in enumerate(ROWS):
      ours = scored(tokenizer, params_of(tokenizer, 6), i)
      label = int(np.argmax(ours)) if i % 2 == 0 else int(np.argmin(ours))
      text = continued(tokenizer, params_of(tokenizer, 6), i)
      answer = text if i % 2 == 0 else 'no'
      f.write(json.dumps({**row, 'label': label, 'answer': answer}) + '\n')
  for name, task in (('choice', CHOICE), ('generate', GENERATE)):
    text = task.replace('PATH', str(tasks / 'rows.jsonl'))
    (tasks / f'{name}.yaml').write_text(text)
  summary = ask(workdir, tasks, '--tasks=local_choice,local_generate')
  return workdir, tasks, tokenizer, summary


def scored(tokenizer, params, i):
  """Our log-probs of the choices of a row.

  As the harness has it, what a choice adds to the pieces of the whole is put
  behind those of the question alone: "rarely" is no "rare" and "ly".
  """
  question, choices = ROWS[i]['question'], ROWS[i]['choices']
  begin = tokenizer.encode(question)
  return [
    log_prob(
      tokenizer, params, [tokenizer.bos_id, *begin],
      tokenizer.encode(question + choice)[len(begin) :],
    )
    for choice in choices
  ]  # fmt: skip


def continued(tokenizer, params, i):
  """Our greedy text after the question of a row, up to a 9."""
  begin = [tokenizer.bos_id, *tokenizer.encode(ROWS[i]['question'])]
  ids = greedy(tokenizer, params, begin)
  return tokenizer.decode(ids).partition('9')[0]


SIDES = [('reference', 5), ('policy', 6)]


@pytest.mark.parametrize('side, seed', SIDES)
def test_their_log_probs_are_ours(found, side, seed):
  workdir, _, tokenizer, summary = found
  params = params_of(tokenizer, seed)
  rows = samples(workdir, side, 'local_choice')
  assert len(rows) == len(ROWS)
  right, right_norm = [], []
  for i, row in enumerate(rows):
    ours = np.array(scored(tokenizer, params, i))
    theirs = np.array([float(x[0][0]) for x in row['resps']])
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    length = np.array([len(x) for x in ROWS[i]['choices']])
    right.append(ours.argmax() == row['doc']['label'])
    right_norm.append((ours / length).argmax() == row['doc']['label'])
  said = summary['scores']['local_choice'][side]
  assert said['acc'][0] == np.mean(right)
  assert said['acc_norm'][0] == np.mean(right_norm)


@pytest.mark.parametrize('side, seed', SIDES)
def test_their_greedy_texts_are_ours(found, side, seed):
  workdir, _, tokenizer, summary = found
  params = params_of(tokenizer, seed)
  rows = samples(workdir, side, 'local_generate')
  texts = [continued(tokenizer, params, i) for i in range(len(ROWS))]
  assert len(set(texts)) > 2 and any(texts)
  assert [row['resps'][0][0] for row in rows] == texts
  right = np.mean([x == row['doc']['answer'] for x, row in zip(texts, rows)])
  assert summary['scores']['local_generate'][side]['exact_match'][0] == right


def test_the_policy_is_after_and_the_reference_before(found):
  """By the labels, which are the policy's best on three rows of five."""
  workdir, _, _, summary = found
  before, after = (
    summary['scores']['local_choice'][side]['acc'][0] for side, _ in SIDES
  )
  assert after == 0.6 and before != after
  assert summary['scores']['local_generate']['policy']['exact_match'][0] >= 0.6
  with open(os.path.join(workdir, 'lm_eval', 'table.md')) as f:
    (line,) = [x for x in f if x.startswith('| local_choice | acc |')]
  cells = [x.strip() for x in line.split('|')[3:6]]
  assert cells[0].startswith(f'{100 * before:.2f} ± ')
  assert cells[1].startswith('60.00 ± ')
  assert cells[2] == f'{60 - 100 * before:+.2f}'


def test_again_does_nothing_and_other_settings_are_refused(found):
  workdir, tasks, _, summary = found
  kept = toy.listing(f'{workdir}/lm_eval')
  assert ask(workdir, tasks, '--tasks=local_choice,local_generate') == summary
  again = toy.listing(f'{workdir}/lm_eval')
  del kept['summary.json'], again['summary.json']
  assert again == kept
  with pytest.raises(AssertionError, match='holds results of other settings'):
    ask(workdir, tasks, '--tasks=local_choice', '--limit=2')


def test_turns_begin_once_and_are_those_that_were_trained(
  found, tmp_path, monkeypatch
):
  """The template of the folder: our turns, one BOS, shots as turns."""
  workdir, tasks, tokenizer, _ = found
  model = os.path.join(workdir, 'lm_eval', 'policy', 'model')
  for name, value in ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  for task in ('local_choice', 'local_generate'):
    out = tmp_path / 'lm_eval' / 'policy' / task
    harness.judge(
      model, task, str(out), chat=True, batch='3', device='cpu', limit=0,
      include=str(tasks),
    )  # fmt: skip
  params = params_of(tokenizer, 6)
  chat = functools.partial(tokenizer_lib.chat, tokenizer, system=True)
  rows = samples(tmp_path, 'policy', 'local_choice')
  for i, row in enumerate(rows):
    said = [{'role': 'user', 'content': ROWS[i]['question']}]
    *begin, _ = chat(said)  # a newline
    assert begin.count(tokenizer.bos_id) == 1
    # The harness counts white space before a choice as part of it.
    ours = [
      log_prob(tokenizer, params, begin, tokenizer.encode('\n' + choice))
      for choice in ROWS[i]['choices']
    ]
    theirs = [float(x[0][0]) for x in row['resps']]
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
  for i, row in enumerate(samples(tmp_path, 'policy', 'local_generate')):
    said = [{'role': 'user', 'content': ROWS[i]['question']}]
    text = tokenizer.decode(greedy(tokenizer, params, chat(said)))
    assert row['resps'][0][0].strip() == text.partition('9')[0].strip()
