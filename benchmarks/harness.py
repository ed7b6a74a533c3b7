"""Standard benchmarks of a run, before and after: docs/lm_eval.md.

    make lm-eval RUN=runs/mine TASKS=gsm8k,hellaswag,mmlu

Exports the reference and the policy of a finished run as Hugging Face folders,
lets EleutherAI's lm-evaluation-harness judge both, task by task, and writes a
table. All is kept in RUN/lm_eval, and what is there already is not done again.
"""

from __future__ import annotations

import glob
import os
import subprocess
import sys
import time
from typing import Any

from absl import flags

from bond_jax.errors import UserError
from bond_jax.runs import command, files, paths, show
from bond_jax.runs.settings import configs

# Shots, as the first Open LLM Leaderboard had them; other tasks say their own.
SHOTS = {'gsm8k': 5, 'hellaswag': 10, 'mmlu': 5}


def export(workdir: str, side: str, checkpoint: str, dtype: str) -> str:
  """The folder of a side's model, exported unless it is there."""
  out = os.path.join(workdir, 'lm_eval', side, 'model')
  if os.path.exists(os.path.join(out, 'summary.json')):
    return out
  call(
    'bond_jax.export', f'--workdir={workdir}', f'--out={out}',
    f'--checkpoint={checkpoint}', f'--dtype={dtype}',
  )  # fmt: skip
  return out


def check_template(model: str) -> None:
  """A UserError if a folder knows no turns, which --chat asks for."""
  path = os.path.join(model, 'tokenizer_config.json')
  described = files.read_json(path) if os.path.exists(path) else {}
  apart = os.path.join(model, 'chat_template.jinja')
  if not (described.get('chat_template') or os.path.exists(apart)):
    raise UserError(
      f'--chat: {model} has no chat template, since the vocabulary of the run'
      ' knows no turns; delete the folder lm_eval of the run and ask without.'
    )


def arguments(
  model: str, task: str, out: str, *, chat: bool, batch: str, device: str,
  limit: int, include: str,
) -> list[str]:  # fmt: skip
  """What `python -m lm_eval` is called with."""
  # Logits come in the dtype of the folder; their softmax need not.
  args = [
    'run', '--model', 'hf', '--tasks', task, '--output_path', out,
    '--model_args', f'pretrained={model}', 'dtype=auto',
    'softmax_dtype=float32', '--batch_size', batch, '--device', device,
    '--log_samples',
  ]  # fmt: skip
  if task in SHOTS:
    args += ['--num_fewshot', str(SHOTS[task])]
  if chat:
    args += ['--apply_chat_template', '--fewshot_as_multiturn', 'true']
  if limit:
    args += ['--limit', str(limit)]
  if include:
    args += ['--include_path', include]
  return args


def judge(model: str, task: str, out: str, **settings) -> dict[str, Any]:
  """What the harness says of a model; from its file if it has said it."""
  if not (found := _results(out)):
    call('lm_eval', *arguments(model, task, out, **settings))
    found = _results(out)
  return files.read_json(found[-1])


def _results(out: str) -> list[str]:
  return sorted(
    glob.glob(os.path.join(out, '**/results_*.json'), recursive=True)
  )


def call(module: str, *args: str) -> None:
  """Runs a module's command; a UserError if it fails."""
  print('+ python -m', module, *args, flush=True)
  done = subprocess.run([sys.executable, '-m', module, *args], check=False)
  if done.returncode:
    raise UserError(
      f'{module} ended with {done.returncode}; it says why above.'
    )


def scores(result: dict[str, Any], task: str) -> dict[str, tuple]:
  """Metric -> (value, standard error), of a task or group as a whole.

  The harness calls them 'acc,none' and 'acc_stderr,none'.
  """
  row = result['results'][task]
  found = {}
  for key, value in row.items():
    name, comma, way = key.partition(',')
    if not comma or name.endswith('_stderr'):
      continue
    error = row.get(f'{name}_stderr,{way}')
    label = name if way == 'none' else f'{name} ({way})'
    found[label] = value, error if isinstance(error, float) else None
  return found


def table(found: dict[str, dict[str, dict[str, tuple]]]) -> list[tuple]:
  """Rows for people; `found` is task -> side -> scores."""
  rows = [('task', 'metric', 'before', 'after', 'difference')]
  for task, sides in found.items():
    for metric, (before, error) in sides['reference'].items():
      after, error_after = sides['policy'][metric]
      rows.append((
        task, metric, _percent(before, error), _percent(after, error_after),
        f'{100 * (after - before):+.2f}',
      ))  # fmt: skip
  return rows


def _percent(value: float, error: float | None) -> str:
  said = f'{100 * value:.2f}'
  return said if error is None else f'{said} ± {100 * error:.2f}'


def markdown(rows: list[tuple]) -> str:
  head, *body = [f'| {" | ".join(row)} |' for row in rows]
  return '\n'.join([head, '|---|---|---|---|---|', *body]) + '\n'


def main(
  workdir: str, tasks: list[str], checkpoint: str, dtype: str, **settings
) -> None:
  """Exports, judges and writes table.md and summary.json."""
  start = time.perf_counter()
  folder = os.path.join(workdir, 'lm_eval')
  asked = dict(checkpoint=checkpoint, dtype=dtype, **settings)
  path = os.path.join(folder, 'summary.json')
  if os.path.exists(path):
    before = files.read_json(path)['asked']
    if rows := configs.differences(before, asked):
      raise UserError(
        f'{folder} holds results of other settings ({"; ".join(rows)}); move it'
        ' away to ask with these.'
      )
  os.makedirs(folder, exist_ok=True)
  files.write_json(path, {'asked': asked})
  models = {
    'reference': export(workdir, 'reference', 'reference', dtype),
    'policy': export(workdir, 'policy', checkpoint, dtype),
  }
  if settings['chat']:
    check_template(models['policy'])
  results = {
    task: {
      side: judge(model, task, os.path.join(folder, side, task), **settings)
      for side, model in models.items()
    }
    for task in tasks
  }
  found = {
    task: {side: scores(x, task) for side, x in sides.items()}
    for task, sides in results.items()
  }
  rows = table(found)
  with open(os.path.join(folder, 'table.md'), 'w', encoding='utf-8') as f:
    f.write(markdown(rows))
  last = results[tasks[-1]]['policy']
  summary = {
    'asked': asked,
    'scores': found,
    'shots': {t: x['policy'].get('n-shot') for t, x in results.items()},
    'lm_eval': last.get('lm_eval_version'),
    'transformers': last.get('transformers_version'),
    'seconds': round(time.perf_counter() - start, 3),
  }
  files.write_json(path, summary)
  show.table(rows, f'lm_eval: done, see {path}')


def _run() -> None:
  workdir = paths.flag('workdir', None, 'A finished run.', required=True)
  tasks = flags.DEFINE_list('tasks', list(SHOTS), 'Of the harness.')
  checkpoint = command.checkpoint_flag()
  dtype = flags.DEFINE_enum(
    'dtype', 'bfloat16', ['bfloat16', 'float32'], 'Of the exported weights.'
  )
  chat = flags.DEFINE_bool('chat', False, "In the folder's chat template.")
  batch = flags.DEFINE_string('batch', '8', 'Texts at a time, or "auto".')
  device = flags.DEFINE_string('device', 'cpu', 'Of torch: cpu, cuda:0, mps.')
  limit = flags.DEFINE_integer('limit', 0, 'Only so many of a task; 0 = all.')
  include = paths.flag('include', '', 'A folder of tasks of your own.')
  command.execute(
    lambda: main(
      workdir.value, tasks.value, checkpoint.value,
      dtype.value, chat=chat.value, batch=batch.value, device=device.value,
      limit=limit.value, include=include.value,
    ),
    __doc__,
  )  # fmt: skip


if __name__ == '__main__':
  _run()
