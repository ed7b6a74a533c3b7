r"""The demo: J-BOND of a tiny Gemma 3 on movie-review sentences.

    make demo

Another algorithm on the same task is another argument,
`--config=configs/demo.py:algorithm=rloo`. Hardware: any laptop; two CPU cores
take about five minutes. A real run differs in sizes alone. Settings that are
not here have the value that bond_jax/runs/settings/defaults.py gives them.
"""

import ml_collections

from bond_jax.runs.settings import defaults

# Steps, batch, learning rate and arguments of each. All draw 92,160
# completions: steps x batch x completions per prompt.
ALGORITHMS = dict(
  jbond=(240, 128, 5e-4, dict(
    num_anchor=2, backward_weight=0.5, anchor_rate=0.022, drift_weight=0.0,
  )),
  bond=(160, 64, 5e-4, dict(
    n=4, backward_weight=0.5, drift_weight=0.0, num_policy=1,
    quantile='monte_carlo', num_quantile=8, zero='half', second_term=False,
    anchor='fixed',
  )),
  best_of_n=(180, 128, 5e-4, dict(n=4, anchor='fixed')),
  vbon=(160, 64, 5e-4, dict(n=4, num_quantile=8)),
  bonbon=(180, 128, 5e-4, dict(n=4, sft_weight=0.005)),
  wind=(180, 128, 3e-4, dict(
    kl_weight=0.2, step_size=1.0, risk='squared', constant='fitted',
    num_anchor=4, rows=4,
  )),
  sppo=(180, 128, 1e-4, dict(step_size=1.0, num_anchor=4, rows='extremes')),
  rloo=(360, 128, 3e-4, dict(num_policy=2, kl_weight=0.7)),
  tilt=(720, 16, 3.5e-4, dict(
    num_policy=7, num_anchor=1, kl_weight=0.2, quantile='pooled',
  )),
  qrpo=(480, 16, 3.5e-4, dict(
    num_policy=0, num_anchor=12, rows=12, transform='identity', kl_weight=0.2,
  )),
  reinforce=(720, 128, 3e-4, dict(kl_weight=0.7)),
  online_dpo=(360, 128, 1e-4, dict(kl_weight=1.0)),
  ipo=(360, 128, 3e-4, dict(kl_weight=0.2)),
  # With --config.teacher alone.
  on_policy_distillation=(180, 128, 3e-4, dict(num_policy=4)),
)  # fmt: skip


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """Returns the settings of all four stages, for one algorithm."""
  _, _, name = argument.partition('algorithm=')
  # A name that is not here is refused, with those that are, by every stage.
  steps, batch, rate, args = ALGORITHMS.get(name, (1, 8, 1e-3, {}))
  config = defaults.make('text', sft=True, reward_model='ridge')
  config.data.name = 'movie_reviews'
  config.tokenizer.vocab_size = 1024  # the sft stage trains it on the data
  config.model.update(
    name='gemma3_tiny', dtype='float32', scan=False, remat='none'
  )
  # BOS and the first four pieces of a sentence.
  config.prompt.update(kind='opening', length=5)
  config.length = 24
  config.chunk = 8192
  config.sft.update(steps=320, target='text', length=48, save_every=80)
  config.sft.optimizer.update(learning_rate=2e-2, warmup_steps=30)
  config.reward.update(
    function='bond_jax.rewards.ridge:ridge',
    args=dict(path='{reference}/reward/model.npz'),
  )
  config.gold.function = 'bond_jax.rewards.text:vader'
  config.algorithm.update(name=name, args=args)
  # Noise is what limits J-BOND here: a batch 16 times as large pays 0.78 nats,
  # not 1.02, for a win rate of 0.8 (docs/benchmarks.md).
  config.train.update(
    steps=steps, batch=batch, save_every=20, probe_completions=4
  )
  config.train.optimizer.update(
    learning_rate=rate, warmup_steps=20, decay_to=0.1
  )
  if name in ('tilt', 'qrpo'):  # small steps: docs/benchmarks.md
    config.train.optimizer.update(decay_to=0.0, layer_rate=0.3)
  config.evaluate.update(policy_completions=32, at_once=8)
  return config
