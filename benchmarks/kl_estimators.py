"""Three estimates of a KL from samples: their exact bias and variance.

    python -m benchmarks.kl_estimators

Of x = log policy(y) / reference(y), y from the policy: k1 = x, k2 = x^2 / 2 and
k3 = exp(-x) - 1 + x (Schulman, Approximating KL divergence, 2020). The language
is enumerated (configs/enumerable.py), so nothing is sampled: policies are exact
Best-of-N of the reference, with rewards that do not tie, and J-BOND by exact
gradients. Prints the KL, the bias of each estimate and the deviation of one
completion within its prompt. A minute.
"""

from __future__ import annotations

from absl import app
import numpy as np
import optax

from benchmarks import exact_gradients
from bond_jax.devices import sharding
from bond_jax.measures import tables
from bond_jax.runs import environment, show, stages
from bond_jax.training.tasks import enumerable
from configs import enumerable as config_file

ESTIMATES = {
  'k1': lambda x: x,
  'k2': lambda x: x**2 / 2,
  'k3': lambda x: np.expm1(-x) + x,
}


def told(log_policy: np.ndarray, log_reference: np.ndarray) -> list[float]:
  """The KL; bias and deviation of each estimate; means over prompts."""
  p, x = np.exp(log_policy), log_policy - log_reference
  kl = (p * x).sum(-1)
  row = [float(kl.mean())]
  for estimate in ESTIMATES.values():
    value = estimate(x)
    mean = (p * value).sum(-1)
    variance = (p * (value - mean[:, None]) ** 2).sum(-1).mean()
    row += [float((mean - kl).mean()), float(np.sqrt(variance))]
  return row


def main(_) -> None:
  environment.configure_jax()
  config = config_file.get_config('algorithm=jbond')
  task = enumerable.make(
    stages.Run(config, '', sharding.make_mesh(data=1, model=1))
  )
  known = enumerable.know(config, task.policy, task.frozen)
  head = ['policy', 'KL']
  head += [f'{k} {what}' for k in ESTIMATES for what in ('bias', 'deviation')]
  table = [tuple(head)]
  for n in (1.1, 2, 4, 8, 16):
    law = tables.best_of_n(known.log_reference, known.reward, n)
    table.append((f'Best-of-{n}', *told(law, known.log_reference)))
  policies = exact_gradients.laws(
    config, backward_weight=0.5, rate=0.02, moves=160, first=20, inner=5,
    optimizer=optax.adam(1e-3),
  )  # fmt: skip
  for move, (_, law) in enumerate(policies):
    if move in (5, 20, 40, 80, 160):
      row = told(law, known.log_reference)
      table.append((f'J-BOND, move {move}', *row))
  short = lambda x: f'{x:.2g}' if isinstance(x, float) else x
  table = [tuple(map(short, row)) for row in table]
  show.table(table, 'Estimates of a KL, nats')


if __name__ == '__main__':
  app.run(main)
