r"""Gemma 3 270M on a laptop: J-BOND of LoRA adapters on movie sentences.

    ACCEPT_GEMMA_TERMS=yes make gemma

Real English before and after. The reward is the ridge regression on people's
ratings that the reward_model stage fits; VADER, which nothing is trained on,
judges as well. Weights that were tuned to answer take
`--config.prompt.kind=turn`; a GPU or TPU `--config.model.dtype=bfloat16`.
Hardware: two CPU cores and 6 GB.
"""

from bond_jax.runs.settings import defaults


def get_config():
  config = defaults.make('text', reward_model='ridge')
  config.data.name = 'movie_reviews'
  config.weights = config.tokenizer.path = 'data/gemma-3-270m'
  config.tokenizer.vocab_size = 262_144
  config.model.update(name='gemma3_270m', dtype='float32', remat='none')
  config.model.lora.update(rank=8, alpha=8.0)
  # BOS and the first four pieces of a sentence, and as many words again.
  config.prompt.update(kind='opening', length=5)
  config.length = 16
  config.reward.update(
    function='bond_jax.rewards.ridge:ridge',
    args=dict(path='{reference}/reward/model.npz'),
  )
  config.gold.function = 'bond_jax.rewards.text:vader'
  config.algorithm.update(
    name='jbond',
    args=dict(
      num_anchor=2, backward_weight=0.5, anchor_rate=0.022, drift_weight=0.0
    ),
  )
  config.train.update(
    steps=60, batch=16, save_every=20, probe_prompts=32, probe_completions=2
  )
  config.train.optimizer.update(
    learning_rate=1e-3, warmup_steps=5, decay_to=0.1
  )
  config.evaluate.update(
    prompts=64, policy_completions=8, reference_completions=16, at_once=8
  )
  return config
