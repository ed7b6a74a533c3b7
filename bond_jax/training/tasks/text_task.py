"""What the text stages train on: prompts of the data, a reward on text.

Named by `config.task`; `task.Task` says what a task is.
"""

from collections.abc import Callable
import functools
import itertools
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from bond_jax.data import examples, preferences, sources, stored
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import hosts, sharding, shares
from bond_jax.errors import UserError
from bond_jax.measures import comparisons
from bond_jax.models import lora, policies, sampling, stops
from bond_jax.models.log_probs import log_probs
from bond_jax.models.sampling import Limits, sample
from bond_jax.rewards import calling
from bond_jax.rewards import make as making
from bond_jax.runs import stages
from bond_jax.runs.settings import configs, defaults
from bond_jax.training import setups
from bond_jax.training.tasks import task
from bond_jax.types import Context, Prompts, Rollout
from bond_jax.weights import load, teachers


def check(config: ml_collections.ConfigDict, mesh, rows) -> None:
  """Refuses what some stage could not work with.

  A wrong setting of a late stage must not cost the early ones.
  """
  defaults.check(config.to_dict(), defaults.TEXT_NEEDS)
  drawn_on = sharding.reshaped(mesh, **config.sampling_mesh)
  for name, batch in (
    ('train.probe_prompts', config.train.probe_prompts),
    ('evaluate.prompts', config.evaluate.prompts),
  ):
    sharding.check_batch(name, batch, mesh, 1)
    sharding.check_batch(name, batch, drawn_on, 1)
  if 'sft' in config:
    sft = config.sft
    sharding.check_batch('sft.batch', sft.batch, mesh, sft.micro_batches)
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  parts = drawn_on.shape['data']
  stop = stops.make((), [b''], config.stop)  # the ids come with a vocabulary
  sampling.check(policy, Limits(config.length, stop, config.slots), parts)
  teachers.find(config)
  for name in ('reward', 'gold'):
    making.check_reward(config[name], name)
  splits = {split: rows(split) for split in preferences.SPLITS}
  trained = ['train']
  if config.data.stored:
    check_offline(config)
    splits['stored'] = rows('stored')
    trained.append('stored')
  pairs = itertools.product(trained, ('validation', 'test'))
  sources.check_apart(splits, *pairs)


def check_offline(config: ml_collections.ConfigDict) -> None:
  """Refuses an algorithm that cannot do with completions drawn before."""
  algorithm, name = setups.make_algorithm(config), config.algorithm.name
  why = ''
  if algorithm.num_policy:
    why = "needs fresh completions of the policy's"
  elif algorithm.anchor.moves:
    why = 'draws from an anchor that moves'
  if why:
    raise UserError(
      f'algorithm {name} {why}, and data.stored has those that were drawn'
      " before; take qrpo with num_policy 0, best_of_n with anchor 'fixed' or"
      " bonbon, or set data.stored to ''."
    )


def stored_reader(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  least: int,
) -> stored.Read:
  """What reads stored completions, at least so many of a prompt.

  One that is finished ends as the reference ends its own: as the sft stage has
  taught it, else with the end of a turn after turns, with EOS after a text.
  """
  turns = config.prompt.kind == 'turn'
  if 'sft' in config:
    turns = config.sft.target == 'completion'
  return stored.reader(
    tokenizer,
    end=tokenizer.stop_ids[-1] if turns else tokenizer.eos_id,
    stop=config.stop,
    length=config.length,
    least=least,
  )


def offline(run: stages.Run, tokenizer: tokenizer_lib.Tokenizer):
  """The stored rows; what an encoder of them becomes; and `Task.stored`."""
  config, rows = run.config, run.rows('stored')
  num = setups.make_algorithm(config).num_anchor
  read = stored_reader(config, tokenizer, num)
  draw = functools.partial(
    stored.draw, rows, read, num=num, length=config.length, seed=config.seed
  )
  return rows, functools.partial(stored.usable, read), draw


def make(run: stages.Run) -> task.Task:
  """The task of a run whose sft stage has finished."""
  config, workdir, mesh = run.config, run.workdir, run.mesh
  tokenizer = load.load_tokenizer(config, workdir)
  teacher = teachers.find(config, tokenizer)
  stop = stops.of(tokenizer, config.stop)
  encode = load.make_encoder(config, tokenizer)
  # A bad row shows before weights are loaded, also one that is used later.
  rows, held_out = run.rows('train'), run.rows('validation')
  usable, known = lambda make: make, None
  if config.data.stored:
    rows, usable, known = offline(run, tokenizer)
  whole = load.make_encoder(config, tokenizer, longer='drop')
  facts = look_at(rows, usable(whole), config.prompt)
  prompts = examples.fixed_prompts(
    held_out,
    encode,
    length=config.prompt.length,
    count=config.train.probe_prompts,
  )
  for part in sources.parts(run.rows('test')):
    made = sources.each(part.rows, encode)
    list(itertools.islice(made, config.evaluate.prompts))
  policy = policies.make_policy(config.model, config.tokenizer.vocab_size)
  frozen = load.load_frozen(config, policy, workdir, mesh)
  start = None
  if teacher:
    start = frozen.reference
    frozen = frozen._replace(reference=teacher.load(mesh))
  ask, ask_gold = (
    making.make_ask(config, name, workdir) for name in ('reward', 'gold')
  )

  def scored(prompts, drawn):
    return ask(*texts(config, tokenizer, rows, prompts, drawn))

  def make_probe(frozen):
    on_mesh = sharding.put_batch(prompts, mesh)
    probe = probe_programs(
      config, policy, stop, mesh, teacher and teacher.policy
    )
    key, base = configs.key(config.seed, 'probe'), frozen.base
    of_stream = functools.partial(jax.random.fold_in, key)
    draw = lambda params, stream: probe.draw(
      params, base, on_mesh, of_stream(stream)
    )
    draw_teacher = lambda stream: probe.draw_teacher(
      frozen.reference, on_mesh, of_stream(stream)
    )
    draw_own = functools.partial(draw, frozen.reference)
    log_ratio = lambda frozen, drawn: shares.fetch(
      probe.score(frozen, on_mesh, drawn)
    )
    fetched = lambda drawn: texts(
      config, tokenizer, held_out, prompts, shares.fetch(drawn)
    )
    own = shares.own(mesh, config.train.probe_prompts)
    return probe_of(
      draw, draw_teacher if teacher else draw_own, log_ratio, ask, ask_gold,
      fetched, own,
    )  # fmt: skip

  return task.Task(
    policy=policy,
    frozen=frozen,
    stop=stop,
    batches=examples.prompts(
      rows,
      usable(encode),
      length=config.prompt.length,
      batch=config.train.batch,
      seed=config.seed,
    ),
    reward=scored,
    make_probe=make_probe,
    stored=known,
    facts=facts,
    teacher=teacher and teacher.policy,
    start=start,
  )


def look_at(
  rows: examples.Source, make: examples.Make, prompt
) -> dict[str, int]:
  """Says, once, what of the data is not used, and how much.

  `make` drops prompts that are too long; where `prompt`, the settings of the
  prompts, is None, it makes none.
  """
  bad = []
  counts = examples.count_left_out(rows, make, bad=bad)
  looked_at = sum(count.looked_at for count in counts)
  facts, lines = {'rows_looked_at': looked_at}, []
  if prompt:
    kept = prompt.kind != 'opening' and prompt.longer == 'cut'
    lost = sum(count.left_out for count in counts)
    facts = {'prompts_looked_at': looked_at}
    facts['prompts_cut' if kept else 'prompts_left_out'] = lost
    lines = examples.describe(counts, prompt.kind, prompt.length, prompt.longer)
  if empty := sources.empty_lines(rows):
    lines.append(f'data: {empty:,} empty lines are skipped')
  if bad:
    lines.append(sources.skipped(bad, looked_at, 'data'))
  if lines:
    hosts.say('\n'.join(lines))
  return {**facts, 'bad_rows': len(bad), 'empty_lines': empty}


class Probe(NamedTuple):
  """Programs of their own: no reference is there while the policy draws."""

  draw: Callable[..., Any]  # params, base, prompts, key -> rollout
  draw_teacher: Callable[..., Any]  # params, prompts, key -> rollout
  score: Callable[..., Any]  # frozen, prompts, rollout -> log-ratio f32[B, K]


def probe_programs(config, policy, stop, mesh, teacher=None) -> Probe:
  """The programs of a probe; the reference is the `teacher`'s, if not None."""
  sampling_mesh = sharding.reshaped(mesh, **config.sampling_mesh)
  limits = Limits(config.length, stop, config.slots, sampling_mesh)
  num = config.train.probe_completions

  def draw(params, base, prompts, key):
    of_base = lora.over(policy, base)
    return sample(of_base, params, prompts, key, limits, num=num)

  def draw_teacher(params, prompts, key):
    return sample(teacher, params, prompts, key, limits, num=num)

  def score(frozen, prompts, drawn):
    log_reference = log_probs(
        teacher or lora.over(policy, frozen.base), frozen.reference, prompts,
        drawn.completion, drawn.mask, chunk=config.chunk,
    )  # fmt: skip
    return (drawn.log_prob - log_reference).sum(-1)

  jit = functools.partial(jax.jit, out_shardings=sharding.by_row(mesh))
  return Probe(jit(draw), jit(draw_teacher), jit(score))


def probe_of(draw, draw_reference, log_ratio, ask, ask_gold, read, own):
  """How the policy does against the reference on fixed validation prompts.

  The reference's completions are drawn once, with a key of their own, so that
  the curve moves with the policy alone. `read` makes of completions the texts
  that `ask` calls the reward with; a judge compares them with the reference's.
  Where the reward rises and gold, which nothing is trained on, falls, the
  policy has learnt the reward's mistakes. Both are asked about the rows that
  this host owns.
  """

  def judge(ask, texts) -> tuple[calling.Scored, np.ndarray]:
    """What the reward and gold say of the texts of all hosts."""
    mine = calling.some(own, *texts)
    found = (ask(*mine), ask_gold(*mine)) if len(own) else None
    told = hosts.gather((own, found))
    of = lambda i: calling.join([(rows, x and x[i]) for rows, x in told])
    return of(0), of(1).value

  opponents = read(draw_reference(1))
  before, gold_before = judge(ask, opponents)
  if gold_before.ndim == 3:
    raise UserError(
      'gold compares pairs; it must be a reward, a number for each completion.'
    )
  pairs = before.value.ndim == 3

  def ask_against(*mine) -> calling.Scored:
    return calling.against(ask, mine, calling.some(own, *opponents))

  def probe(params, whole) -> dict[str, Any]:
    drawn = draw(params, 2)
    after, gold = judge(ask_against if pairs else ask, read(drawn))
    kept = (before.weight > 0) & (after.weight > 0)
    if not kept.any():
      raise UserError(
        "the reward gave no validation prompt a number for the policy's"
        " completions and for the reference's, so that nothing can be compared:"
        ' see why it fails, or set a larger train.probe_prompts.'
      )
    mine = after.value[kept]
    return {
      'win_rate/reference': float(mine.mean())
      if pairs
      else comparisons.win_rate(mine, before.value[kept]),
      'kl/reference': float(log_ratio(whole(), drawn).mean()),
      'reward/validation': float(mine.mean()),
      'win_rate/gold': comparisons.win_rate(gold, gold_before),
      'gold/validation': float(gold.mean()),
    }

  return probe


def texts(
  config: ml_collections.ConfigDict,
  tokenizer: tokenizer_lib.Tokenizer,
  rows: examples.Source,
  prompts: Prompts,
  drawn: Rollout,
) -> tuple[list[str], list[list[str]], Context]:
  """What a reward is called with; `rows` are the data, arrays on the host.

  Prompts are quoted by `examples.last_words`, an opening as the model saw it.
  """
  some = [rows[int(i)] for i in prompts.id]
  if config.prompt.kind == 'opening':
    quoted = [tokenizer.decode(row) for row in prompts.tokens]
  else:
    quoted = [examples.last_words(row, config.prompt.kind) for row in some]
  tokens = [
    [y[m].tolist() for y, m in zip(ys, masks, strict=True)]
    for ys, masks in zip(drawn.completion, drawn.mask, strict=True)
  ]
  cut = stops.of(tokenizer, config.stop).cut(drawn.completion, drawn.mask)
  context = Context(some, tokens, ~cut, config.prompt.kind == 'turn')
  return quoted, [[tokenizer.decode(y) for y in ys] for ys in tokens], context
