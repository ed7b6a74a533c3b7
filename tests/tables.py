"""Random tables of bandits: laws, rewards and preferences.

Tables are [X, A]: three prompts unless said otherwise. Rock, paper, scissors is
the cyclic preference; `soft` preferences are probabilities other than 0, 1/2
and 1.
"""

import numpy as np

from bond_jax.measures import tables

ROCK_PAPER_SCISSORS = np.array([[[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]]])


def law(seed, prompts=3, arms=5, sd=1.0):
  """A table of log-probabilities."""
  rng = np.random.default_rng(seed)
  return tables.normalise(sd * rng.standard_normal((prompts, arms)))


def tied_reward(seed, prompts=3, arms=5):
  """Rewards of which some tie."""
  rng = np.random.default_rng(seed)
  return rng.integers(0, arms // 2 + 1, (prompts, arms)).astype(float)


def preference(kind, seed, prompts=3, arms=6):
  """win [X, A, A] of one kind."""
  rng = np.random.default_rng(seed)
  if kind == 'distinct':
    return tables.win_matrix(rng.standard_normal((prompts, arms)))
  if kind == 'tied':
    return tables.win_matrix(tied_reward(seed, prompts, arms))
  edge = np.triu(rng.standard_normal((prompts, arms, arms)), 1)
  edge = np.sign(edge) if kind == 'cyclic' else np.tanh(edge)
  return 0.5 + 0.5 * (edge - edge.swapaxes(-1, -2))


def distance(log_p, log_q):
  """Total variation, the largest over all prompts."""
  return 0.5 * np.abs(np.exp(log_p) - np.exp(log_q)).sum(-1).max()
