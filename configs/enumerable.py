r"""A language that can be enumerated: every measure is exact.

    python -m bond_jax.train --config=configs/enumerable.py:algorithm=jbond \
      --workdir=runs/enumerable

Hardware: a CPU core or two; a minute or so. The model is Gemma 3 in all but
size: 8 prompts, completions of at most 3 tokens out of 8, 400 in all.
"""

import ml_collections

from configs import demo

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
  reinforce=dict(kl_weight=0.1),
  online_dpo=dict(kl_weight=0.1),
  ipo=dict(kl_weight=0.25),
)


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """Returns the settings of the train stage, for one algorithm."""
  _, _, name = argument.partition('algorithm=')
  args = ALGORITHMS.get(name, {})
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.mesh = dict(data=1, model=1)
  config.sampling_mesh = dict(data=1, model=1)
  config.save_failure = 'stop'  # or 'go_on', when a save fails
  config.task = 'enumerable'
  config.reference = '{workdir}'
  config.enumerable = dict(
    seed=0,  # of the reference's parameters and of the rewards
    prompts=8,
    vocab=8,  # of completions, EOS included
    best_of=4,  # the N of the target that the KLs are taken to
    # Of the WIND equilibrium that equilibrium_kl is taken to; 0 = of none.
    kl_weight=args['kl_weight'] if name in ('wind', 'ipo') else 0.0,
  )
  config.length = 3
  config.chunk = 4096
  config.slots = 0
  config.model = dict(
    name='gemma3_tiny',
    sizes=dict(
      features=64,
      layers=2,
      heads=4,
      kv_heads=2,
      head_size=16,
      feed_forward=256,
    ),
    temperature=1.0,
    dtype='float32',
    scan=False,
    remat='none',
    lora=dict(
      rank=0, alpha=16.0, targets='attn|mlp', weights='', exact_anchor=False
    ),
  )
  # An unknown name is refused with the list of those there are.
  config.algorithm = dict(name=name, args=args)
  config.train = dict(
    steps=1000,
    batch=256,
    rollouts=1,
    epochs=1,
    micro_batches=1,
    buckets=1,
    optimizer=dict(
      learning_rate=1e-3,
      warmup_steps=20,
      decay_to=0.1,
      b1=0.9,
      b2=0.99,
      epsilon=1e-8,
      weight_decay=0.0,
      clip=1.0,
    ),
    save_every=50,
    skip_limit=0,
    watch=demo.watch(),
  )
  return config
