r"""The papers' figures at laptop scale, on the language that can be enumerated.

    python -m benchmarks.papers.reproduce --config=configs/figures.py:bond_2 \
      --workdir=runs/figures/bond_2

Hardware: two CPU cores, one to eight minutes a figure; `make figures` draws
all of them. What the papers show, and what these show, is in
docs/reproduction.md. The papers' tasks are summaries (T5) and conversations
(Gemma); ours is a small Gemma-shaped policy whose law is known exactly.
"""

import ml_collections

from configs import enumerable

_NOTE = (
  'A transformer over 8 prompts x 400 completions; all measures exact. Sizes,'
  " learning rates and rewards are ours, not the paper's."
)


def get_config(name: str) -> ml_collections.ConfigDict:
  """Returns the runs and the panels of one figure."""
  if name not in FIGURES:
    raise ValueError(f'figure {name!r}; known are {", ".join(FIGURES)}')
  config = ml_collections.ConfigDict()
  config.runs, config.labels = dict(), dict()
  config.figure = dict(
    title='',
    panels=(),
    log=(),
    best_of=(1, 2, 4, 8, 16, 32, 64),
    reach=(),
    note=_NOTE,
  )
  FIGURES[name](config)
  return config


def add(config, label, algorithm, *, steps, save_every=50, **args):
  """Adds a run on the enumerable language; `args` go to the algorithm."""
  run = enumerable.get_config(f'algorithm={algorithm}')
  run.train.steps, run.train.save_every = steps, save_every
  run.algorithm.args.update(args)
  run.enumerable.kl_weight = 0.0
  name = ''.join(c if c.isalnum() else '_' for c in label)
  config.runs[name], config.labels[name] = run, label


def bond_2(config):
  config.figure.title = 'BOND, Figure 2: Jeffreys weight, N = 4'
  config.figure.panels = (
    ('step', 'backward_kl'), ('step', 'forward_kl'), ('step', 'log_quantile'),
  )  # fmt: skip
  config.figure.log = ('backward_kl', 'forward_kl')
  config.figure.best_of = (2, 4)
  for weight in (0.0, 0.5, 1.0):
    add(
      config, f'weight {weight:g}', 'bond', steps=1500, backward_weight=weight
    )


def bond_b1(config):
  """The quantile by counting, or by a network that learns it on the way."""
  config.figure.title = 'BOND, appendix B.1: a learned quantile, N = 4'
  config.figure.panels = (('step', 'backward_kl'), ('step', 'forward_kl'))
  config.figure.log = ('backward_kl', 'forward_kl')
  for label, args in (
    ('counts of 16', dict()),
    ('counts of 16, second term', dict(second_term=True)),
    ('learned', dict(quantile='learned', num_quantile=4)),
  ):
    add(config, label, 'bond', steps=1500, **args)


def bond_4(config):
  config.figure.title = 'BOND, Figure 4: iterative n against one large N'
  config.figure.panels = (
    ('step', 'reward/validation'), ('step', 'log_quantile'),
    ('kl/reference', 'reward/validation'),
  )  # fmt: skip
  for n in (4, 8, 16):
    add(config, f'N = {n}', 'bond', steps=1600, n=n)
  hard = dict(steps=1600, anchor='periodic:400')
  for n in (2, 4):
    add(config, f'iterative n = {n}', 'bond', n=n, **hard)
  # What the paper leaves out matters on a language this small.
  add(
    config, 'iterative n = 2, second term', 'bond', n=2, second_term=True,
    **hard,
  )  # fmt: skip


def bond_5(config):
  """eta = 0.02 against a hard update every 50 steps."""
  config.figure.title = 'BOND, Figure 5: moving average or hard updates'
  config.figure.panels = _THREE
  add(config, 'moving average, 0.02', 'jbond', steps=500, save_every=20)
  hard = dict(
    n=2, quantile='floor', num_quantile=2, anchor='periodic:50'
  )  # fmt: skip
  add(config, 'hard, every 50 steps', 'bond', steps=500, save_every=20, **hard)


_THREE = (
  ('step', 'reward/validation'), ('step', 'kl/reference'),
  ('kl/reference', 'reward/validation'),
)  # fmt: skip


def bond_6(config):
  config.figure.title = 'BOND, Figure 6: anchor rate eta, drift weight gamma'
  config.figure.panels = _THREE
  for rate in (0.01, 0.05, 0.1):
    add(
      config,
      f'eta {rate:g}, gamma 0',
      'jbond',
      steps=400,
      save_every=20,
      anchor_rate=rate,
    )
  for drift in (0.5, 1.0, 2.0):
    add(
      config,
      f'eta 0.05, gamma {drift:g}',
      'jbond',
      steps=400,
      save_every=20,
      anchor_rate=0.05,
      drift_weight=drift,
    )


def bond_7(config):
  config.figure.title = 'BOND, Figure 7: J-BOND against REINFORCE'
  config.figure.panels = _THREE
  add(config, 'J-BOND', 'jbond', steps=800, save_every=20)
  for weight in (0.03, 0.1, 0.3, 1.0):
    add(
      config,
      f'RLOO, KL weight {weight:g}',
      'rloo',
      steps=800,
      save_every=20,
      kl_weight=weight,
    )


def bond_8(config):
  config.figure.title = "BOND, Figure 8: J-BOND's reward and the log-quantile"
  config.figure.panels = (('quantile', 'quantile_reward'),)
  config.figure.note = 'Exact. Two draws are J-BOND: they meet log p thrice.'


def wind_2(config):
  config.figure.title = 'Faster WIND, Figure 2: what a win rate costs'
  config.figure.panels = (
    ('seconds', 'win_rate/reference'), ('completions', 'win_rate/reference'),
    ('kl/reference', 'win_rate/reference'),
  )  # fmt: skip
  config.figure.reach = (0.8, 0.9)
  many = dict(steps=200, save_every=5)
  add(config, 'J-BOND', 'jbond', **many)
  add(config, 'SPPO', 'sppo', **many)
  add(config, 'SPPO, all rows', 'sppo', rows='all', **many)
  for risk in ('squared', 'kl', 'nce'):
    add(config, f'WIND {risk}', 'wind', risk=risk, kl_weight=0.1, **many)


FIGURES = {
  f.__name__: f
  for f in (bond_2, bond_b1, bond_4, bond_5, bond_6, bond_7, bond_8, wind_2)
}
