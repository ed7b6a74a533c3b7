r"""Gemma 3 270M on a laptop: LoRA adapters, and the openings of sentences.

    ACCEPT_GEMMA_TERMS=yes make gemma

Real English before and after, in half an hour. The reward is the ridge
regression on people's ratings that the reward_model stage fits; VADER, which
nothing is trained on, judges as well. `:algorithm=jbond` is J-BOND. Weights
that were tuned to answer take `--config.prompt.kind=turn`, a GPU or TPU
`--config.model.dtype=bfloat16`. On CPU `--config.model.scan=False` makes a step
a quarter shorter, and the start some 20 s longer.
Hardware: two CPU cores and 6 GB.
"""

from bond_jax.runs.settings import defaults

# Steps, batch, learning rate and arguments: as many completions, and for SPPO
# and QRPO a quarter of them trained on, which is what takes the time.
ALGORITHMS = dict(
  sppo=(40, 16, 1.2e-4, dict(step_size=1.0, num_anchor=8, rows='extremes')),
  qrpo=(40, 16, 2.5e-4, dict(
    num_policy=0, num_anchor=8, rows=2, transform='identity', kl_weight=0.2,
  )),
  jbond=(53, 32, 1.2e-4, dict(
    num_anchor=2, backward_weight=0.5, anchor_rate=0.05, drift_weight=0.0,
  )),
)  # fmt: skip


def get_config(argument='algorithm=sppo'):
  _, _, name = argument.partition('algorithm=')
  steps, batch, rate, args = ALGORITHMS.get(name, (1, 8, 1e-4, {}))
  config = defaults.make('text', reward_model='ridge')
  config.data.name = 'movie_reviews'
  config.weights = config.tokenizer.path = 'data/gemma-3-270m'
  config.tokenizer.vocab_size = 262_144
  config.model.update(name='gemma3_270m', dtype='float32', remat='none')
  config.model.lora.update(rank=8, alpha=8.0)
  # BOS and the first four pieces of a sentence.
  config.prompt.update(kind='opening', length=5)
  config.length = 16
  config.reward.update(
    function='bond_jax.rewards.ridge:ridge',
    args=dict(path='{reference}/reward/model.npz'),
  )
  config.gold.function = 'bond_jax.rewards.text:vader'
  config.algorithm.update(name=name, args=args)
  config.train.update(steps=steps, batch=batch, save_every=20, probe_prompts=32)
  config.train.optimizer.update(
    learning_rate=rate, warmup_steps=5, decay_to=0.0
  )
  config.evaluate.update(
    prompts=128, policy_completions=4, reference_completions=16
  )
  return config
