"""Completions of training prompts from the reference, with their rewards.

What `data/stored.py` reads. A completion depends only on the seed, its prompt
and its number, so a command that was killed goes on after the last whole row.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import functools
import itertools
import os
from typing import Any

from absl import flags
import jax
import ml_collections
import numpy as np

from bond_jax.data import examples, sources, stored
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import hosts, sharding, shares
from bond_jax.errors import BadRow, UserError
from bond_jax.evaluation import completions
from bond_jax.models import lora, policies, sampling, stops
from bond_jax.rewards import make
from bond_jax.runs import command, log, provenance, stages
from bond_jax.runs.settings import configs
from bond_jax.training import checks
from bond_jax.training.tasks import text_task
from bond_jax.types import Frozen, Prompts, Rollout
from bond_jax.weights import load, teachers


def draw(run: stages.Run, n: int, prompts: int) -> dict[str, Any]:
  """Writes the rows that are not there yet; returns the summary.

  Args:
    run: of which the reference, the data and the reward are.
    n: completions of each prompt.
    prompts: of the train split, the first that are not left out; 0 = all.
  """
  config, workdir, mesh, _ = run
  tokenizer, rows = load.load_tokenizer(config, workdir), run.rows('train')
  encode = load.make_encoder(config, tokenizer)
  # Read before weights are loaded, so that a bad row shows early.
  whole = load.make_encoder(config, tokenizer, longer='drop')
  text_task.look_at(rows, whole, config.prompt)
  used = (i for i in range(len(rows)) if sources.made(rows, i, encode))
  ids = list(itertools.islice(used, prompts or None))
  read = functools.partial(text_task.texts, config, tokenizer, rows)
  judges = {'reward': numbers(make.make_ask(
      config, 'reward', workdir, failure='stop'))}  # fmt: skip
  sample = make_sample(config, tokenizer, workdir, mesh, n)
  folder = os.path.join(workdir, 'draw')
  path = os.path.join(folder, 'completions.jsonl')
  inputs = lambda: {**provenance.inputs(config, workdir, 'train'), 'n': str(n)}
  hosts.once(lambda: completions.begin(path, folder, inputs(), 'draw'))
  done = hosts.once(lambda: begun(path, ids))
  readable = text_task.stored_reader(config, tokenizer, least=n)
  if done:
    hosts.say(f'draw: goes on after {done} prompts')
  size = config.evaluate.prompts
  with log.Writer(folder, 'draw', len(ids), done or None) as writer:
    for begin in range(done, len(ids), size):
      some = ids[begin : begin + size]
      # Always so many: they are compiled once, and shared out evenly.
      filled = list(itertools.islice(itertools.cycle(some), size))
      pieces = [sources.made(rows, i, encode) for i in filled]
      made = examples.padded(filled, pieces, config.prompt.length)
      with writer.phase('sample'):
        drawn = sample(made)
      own = shares.own(mesh, size)
      with writer.phase('judge'):
        judge = completions.make_judge(judges, read, own[own < len(some)])
        texts, scores = judge(made, drawn)
      if hosts.first():
        found = records(rows, some, texts, scores['reward'], readable)
        completions.append(path, list(found))
      tokens = drawn.mask[: len(some)].sum()
      alike = encoded_alike(tokenizer, texts, len(some))
      row = {'tokens/decoded': tokens, 'encoded_alike': alike}
      writer.write(begin + len(some), row)

  def summary() -> dict[str, Any]:
    there = len(log.read_rows(path))
    told = log.read_rows(os.path.join(folder, 'metrics.jsonl'))
    alike = float(np.mean([row['encoded_alike'] for row in told]))
    return {
      'rows': there,
      'left_out': len(ids) - there,
      'encoded_alike': alike,
    }

  return hosts.once(summary)


def begun(path: str, ids: Sequence[int]) -> int:
  """Cuts off a torn row; how many of the prompts are done."""
  if not completions.keep_whole(path, [1] * len(ids)):
    return 0
  return ids.index(log.read_rows(path)[-1]['id']) + 1


def make_sample(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  workdir: str,
  mesh,
  n: int,
) -> Callable[[Prompts], Rollout]:
  """Loads the reference; `n` completions of it, of each prompt, on the host."""
  if teacher := teachers.find(config, tokenizer):
    policy, frozen = teacher.policy, Frozen(teacher.load(mesh), {})
  else:
    policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
    frozen = load.load_frozen(config, policy, workdir, mesh)
  drawn_on = sharding.reshaped(mesh, **config.sampling_mesh)
  stop = stops.of(tokenizer, config.stop)
  limits = sampling.Limits(config.length, stop, config.slots, drawn_on)
  key, at_once = configs.key(config.seed, 'draw'), config.evaluate.at_once

  @functools.partial(
    jax.jit, static_argnames='num', out_shardings=sharding.by_row(mesh)
  )
  def program(frozen, prompts, key, first, num):
    of_base = lora.over(policy, frozen.base)
    return sampling.sample(
        of_base, frozen.reference, prompts, key, limits, num=num, first=first
    )  # fmt: skip

  def sample(prompts: Prompts) -> Rollout:
    on_mesh = sharding.put_batch(prompts, mesh)
    parts = [
      shares.fetch(
        program(frozen, on_mesh, key, first, num=min(at_once, n - first))
      )
      for first in range(0, n, at_once)
    ]
    return jax.tree.map(lambda *x: np.concatenate(x, 1), *parts)

  return sample


def numbers(ask):
  """The values of a reward of single completions; a UserError for a judge's."""

  def reward(*texts):
    value = ask(*texts).value
    if value.ndim == 3:
      raise UserError(
        'the reward compares pairs, and what is stored is a number of each'
        ' completion: take a reward that gives one.'
      )
    return value

  return reward


def records(
  rows: examples.Source,
  ids: Sequence[int],
  texts,
  reward: np.ndarray,
  read: stored.Read,
) -> Iterator[completions.Row]:
  """The rows of some prompts: what they are made of, and what was drawn.

  Without those that `read` refuses: a completion as long as may be can have a
  text that is encoded in more tokens.
  """
  for b, i in enumerate(ids):
    row = rows[i]
    row = {
      'id': i,
      **{k: row[k] for k in ('text', 'messages') if k in row},
      'completions': texts[1][b],
      'rewards': reward[b].tolist(),
      'finished': texts[2].finished[b].tolist(),
    }
    with contextlib.suppress(BadRow):
      read(row)
      yield row


def encoded_alike(
  tokenizer: tokenizer_lib.Tokenizer, texts, count: int
) -> float:
  """The share of completions whose text has the tokens that were drawn.

  Of the first `count` prompts. A text can be encoded in many ways, of which a
  model draws any and the vocabulary knows one: the others are trained on as
  that one.
  """
  _, written, context = texts
  alike = [
    tokenizer.encode(y) == [i for i in ids if i not in tokenizer.stop_ids]
    for ys, tokens in zip(written[:count], context.tokens)
    for y, ids in zip(ys, tokens, strict=True)
  ]
  return float(np.mean(alike))


def main(
  config: ml_collections.ConfigDict, workdir: str, n: int, prompts: int
) -> None:
  stages.stage(
    'draw', draw, config, workdir, folder='draw', open_run=checks.open_run,
    n=n, prompts=prompts,
  )  # fmt: skip


def run(doc: str) -> None:
  """The command, with its flags; `doc` is its help."""
  given = command.run_flags()
  n = flags.DEFINE_integer('n', 8, 'Completions of each prompt.', lower_bound=1)
  prompts = flags.DEFINE_integer(
    'prompts', 0, 'Of the train split, the first; 0 = all.', lower_bound=0
  )
  command.execute(lambda: main(*given(), n=n.value, prompts=prompts.value), doc)
