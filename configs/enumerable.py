r"""A language that can be enumerated: every measure is exact.

    python -m bond_jax.train --config=configs/enumerable.py:algorithm=jbond \
      --workdir=runs/enumerable

Hardware: a CPU core or two; a minute or so. The model is Gemma 3 in all but
size: 8 prompts, completions of at most 3 tokens out of 8, 400 in all.
"""

import ml_collections

from bond_jax.runs.settings import defaults

ALGORITHMS = dict(
  jbond=dict(
    num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0
  ),
  bond=dict(
    n=4,
    backward_weight=0.5,
    drift_weight=0.0,
    num_policy=1,
    quantile='monte_carlo',
    num_quantile=16,
    zero='half',
    second_term=False,
    anchor='fixed',
  ),
  best_of_n=dict(n=4, anchor='fixed'),
  vbon=dict(n=4, num_quantile=16),
  bonbon=dict(n=4, sft_weight=0.005),
  wind=dict(
    kl_weight=0.25,
    step_size=1.0,
    risk='squared',
    constant='fitted',
    num_anchor=4,
    rows=4,
  ),
  sppo=dict(step_size=1.0, num_anchor=4, rows='extremes'),
  rloo=dict(num_policy=4, kl_weight=0.1),
  tilt=dict(num_policy=4, num_anchor=2, kl_weight=0.165, quantile='own'),
  qrpo=dict(
    num_policy=0, num_anchor=16, rows=16, transform='log', kl_weight=1 / 3
  ),
  reinforce=dict(kl_weight=0.1),
  online_dpo=dict(kl_weight=0.1),
  ipo=dict(kl_weight=0.25),
  # Stands still: there is no teacher, and it starts from its reference.
  on_policy_distillation=dict(num_policy=4),
)


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """Returns the settings of the train stage, for one algorithm."""
  _, _, name = argument.partition('algorithm=')
  args = ALGORITHMS.get(name, {})
  config = defaults.make('enumerable')
  for mesh in config.mesh, config.sampling_mesh:
    mesh.data = 1
  # Of the laws that equilibrium_kl and tilt_kl are taken to.
  if name in ('wind', 'ipo', 'tilt'):
    config.enumerable.kl_weight = args['kl_weight']
  config.length, config.chunk = 3, 4096
  config.model.update(
    name='gemma3_tiny',
    sizes=dict(
      features=64,
      layers=2,
      heads=4,
      kv_heads=2,
      head_size=16,
      feed_forward=256,
    ),
    dtype='float32',
    scan=False,
    remat='none',
  )
  # An unknown name is refused with the list of those there are.
  config.algorithm.update(name=name, args=args)
  config.train.update(steps=1000, batch=256, save_every=50)
  config.train.optimizer.update(
    learning_rate=1e-3, warmup_steps=20, decay_to=0.1
  )
  return config
