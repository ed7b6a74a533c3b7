"""A language whose every completion is known, for a real transformer.

`python -m bond_jax.train --config=configs/enumerable.py:algorithm=jbond` trains
a Gemma-shaped policy with the ordinary loop on prompts of one token and
completions of a few, so few that the law of the policy over all of them is
computed at every probe: every KL, quantile and win rate below is exact.

Axes: X prompts, Y completions, T tokens at most. The vocabulary of the
completions is 0 ... V - 1, of which EOS ends one; prompt x is token V + x.
"""

import itertools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bond_jax.devices import sharding, shares
from bond_jax.errors import UserError
from bond_jax.measures import exact
from bond_jax.models import policies, sampling
from bond_jax.models.stops import Stop
from bond_jax.rewards import calling
from bond_jax.runs import stages
from bond_jax.runs.settings import configs, defaults
from bond_jax.training.tasks import task
from bond_jax.types import Frozen, Params, Policy, Prompts, Rollout

EOS = 1
MOST = 3000  # completions of a prompt, so that tables of pairs fit in memory


def completions(vocab: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Every completion: tokens i32[Y, T], 0 after EOS, and mask bool[Y, T]."""
  rows = []
  others = [v for v in range(vocab) if v != EOS]
  for size in range(length):
    rows += [(*y, EOS) for y in itertools.product(others, repeat=size)]
  rows += list(itertools.product(others, repeat=length))
  tokens = np.zeros((len(rows), length), np.int32)
  mask = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    tokens[i, : len(row)], mask[i, : len(row)] = row, True
  return tokens, mask


def codes(tokens: np.ndarray, mask: np.ndarray, vocab: int) -> np.ndarray:
  """A number for every completion, by which it is found: [..., T] -> [...]."""
  digits = np.where(mask, tokens + 1, 0).astype(np.int64)
  return digits @ (vocab + 1) ** np.arange(tokens.shape[-1])


def reward_table(
  seed: int, prompts: int, tokens: np.ndarray, mask: np.ndarray, vocab: int
) -> np.ndarray:
  """f64[X, Y]: a random worth of each token at each place, and of each pair.

  Each place and each pair of neighbours adds a standard normal number, so that
  a completion of T tokens has a variance of about 2 T - 1.
  """
  rng = np.random.default_rng(seed)
  t = tokens.shape[1]
  single = rng.standard_normal((prompts, t, vocab))
  pair = rng.standard_normal((prompts, t, vocab, vocab))
  place = np.arange(t)
  worth = single[:, place, tokens]  # [X, Y, T]
  worth[:, :, 1:] += pair[:, place[1:], tokens[:, :-1], tokens[:, 1:]]
  return (worth * mask).sum(-1)


def language(config: ml_collections.ConfigDict):
  """Rewards f64[X, Y] and completions, tokens and mask [Y, T], of a config."""
  settings = config.enumerable
  tokens, mask = completions(settings.vocab, config.length)
  table = reward_table(
    settings.seed, settings.prompts, tokens, mask, settings.vocab
  )
  return table, tokens, mask


class Cycle:
  """The same prompts in every batch, in turn; ids are places in the batch."""

  def __init__(self, prompts: int, vocab: int, batch: int):
    tokens = vocab + np.arange(batch, dtype=np.int32)[:, None] % prompts
    self._batch = Prompts(
      tokens=tokens,
      mask=np.ones((batch, 1), bool),
      id=np.arange(batch, dtype=np.int32),
      weight=np.ones(batch, np.float32),
    )

  def __next__(self) -> Prompts:
    return self._batch

  def get_state(self) -> dict[str, int]:
    return {}  # there is no position

  def set_state(self, state: dict[str, int]) -> None:
    del state


def check(config: ml_collections.ConfigDict, mesh, rows) -> None:
  """Refuses sizes that do not make a language."""
  del rows  # it has none
  defaults.check(config.to_dict(), ('enumerable',))
  settings = config.enumerable
  powers = (
    (settings.vocab - 1) ** t for t in range(min(config.length, MOST) + 1)
  )
  if any(count > MOST for count in itertools.accumulate(powers)):
    raise UserError(
      f'enumerable.vocab ({settings.vocab}) and length ({config.length}) make'
      f' more than {MOST} completions, which are compared in pairs; lower one.'
    )
  if config.train.batch % settings.prompts:
    raise UserError(
      f'train.batch ({config.train.batch}) must be a multiple of'
      f' enumerable.prompts ({settings.prompts}): the prompts come in turn.'
    )
  if config.model.lora.rank:
    raise UserError(
      f'model.lora.rank is {config.model.lora.rank}: there are no weights under'
      ' the adapters here; set it to 0.'
    )
  parts = sharding.reshaped(mesh, **config.sampling_mesh).shape['data']
  limits = sampling.Limits(config.length, Stop((EOS,)), config.slots)
  sampling.check(make_policy(config), limits, parts)


def make_policy(config: ml_collections.ConfigDict) -> Policy:
  """The model with one more row of its embedding for each prompt."""
  settings = config.enumerable
  model = config.model.copy_and_resolve_references()
  with model.unlocked():
    model.sizes.vocab_size = settings.vocab + settings.prompts
  return policies.make_policy(model, settings.vocab)


def exact_law(config: ml_collections.ConfigDict, policy: Policy):
  """A function from params to log pi of every completion: f32[X, Y, T].

  What comes before a token is read once for all completions that begin so.
  """
  settings, length = config.enumerable, config.length
  tokens, mask = completions(settings.vocab, length)
  # C beginnings without an end: EOS and what follows it predict nothing.
  begin = np.where(tokens == EOS, 0, tokens)[:, :-1]
  begin, row = np.unique(begin, axis=0, return_inverse=True)
  prompts = next(Cycle(settings.prompts, settings.vocab, settings.prompts))
  before = np.repeat(prompts.tokens, len(begin), 0)
  inputs = np.hstack([before, np.tile(begin, (settings.prompts, 1))])
  place = np.arange(length)

  def law(params: Params):
    hidden = policy.hidden(params, inputs, np.ones(inputs.shape, bool))
    log_p = jax.nn.log_softmax(policy.logits(params, hidden), -1)
    log_p = log_p.reshape(settings.prompts, len(begin), length, -1)
    return jnp.where(mask, log_p[:, row[:, None], place, tokens], 0.0)

  return law


def make(run: stages.Run) -> task.Task:
  """The task: reference and rewards are drawn by the seed of the language."""
  config, mesh = run.config, run.mesh
  settings = config.enumerable
  policy = make_policy(config)
  key = configs.key(settings.seed, 'reference')
  reference = sharding.initialised(policy.init, key, mesh)

  def make_probe(frozen):
    known, law = know(config, policy, frozen), log_law(config, policy)
    return lambda params, _: exact.measure(law(params), known)

  return task.Task(
    policy=policy,
    frozen=Frozen(reference, {}),
    stop=Stop((EOS,)),
    batches=Cycle(settings.prompts, settings.vocab, config.train.batch),
    reward=lookup(*language(config), settings.vocab),
    make_probe=make_probe,
  )


def lookup(table, tokens, mask, vocab: int):
  """The reward of drawn completions: (prompts, rollout) -> Scored."""
  known = codes(tokens, mask, vocab)
  order = np.argsort(known)

  def reward(prompts: Prompts, drawn: Rollout) -> calling.Scored:
    code = codes(drawn.completion, drawn.mask, vocab)
    y = order[np.searchsorted(known, code, sorter=order)]
    x = prompts.tokens[:, -1:] - vocab
    value = table[x, y].astype(np.float32)
    return calling.Scored(value, np.ones(len(x), np.float32), {})

  return reward


def log_law(config: ml_collections.ConfigDict, policy: Policy):
  """A function from params to log pi of every completion: f64[X, Y]."""
  law = jax.jit(exact_law(config, policy))

  def on_host(params):
    log_p = np.asarray(shares.fetch(law(params)), np.float64).sum(-1)
    # The model's float32 sums to 1 but for a rounding.
    return log_p - np.logaddexp.reduce(log_p, -1, keepdims=True)

  return on_host


def know(
  config: ml_collections.ConfigDict, policy: Policy, frozen: Frozen
) -> exact.Known:
  """What is known of the language once and for all."""
  settings = config.enumerable
  log_reference = log_law(config, policy)(frozen.reference)
  return exact.know(
    log_reference, language(config)[0], settings.best_of, settings.kl_weight
  )
