r"""The demo, with a reward that is a Gemma: learnt from people's ratings.

    make demo CONFIG=configs/demo_learned_reward.py WORKDIR=runs/learned

The reward model has a scalar head and a vocabulary of its own, of whole words,
and is trained from random weights on the ratings of the sentences. Of two test
sentences that people rated 1 or more apart it finds the better one in 0.84 of
the pairs, a bag of words in 0.82 (docs/reward_model.md). J-BOND is trained
against it; VADER judges, as in the demo. Another algorithm is another argument,
`:algorithm=rloo`. Hardware: any laptop; the reward model takes about five
minutes of one CPU core.
"""

import ml_collections

from bond_jax.runs.settings import defaults
from configs import demo


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """The demo's settings, for one algorithm, with a Gemma as the reward."""
  config = demo.get_config(argument)
  config.reward_model = defaults.make('text', reward_model='gemma').reward_model
  mine = config.reward_model
  mine.update(
    loss='regression',  # on ratings; 'bradley_terry', 'margin' on pairs
    weights='random',
    # What differs from the run's own.
    tokenizer=dict(path='', sha256='', vocab_size=8192),
    model=dict(sizes=dict(vocab_size=8192, layers=1, feed_forward=256)),
    pool='mean',  # of the hidden states, which the head reads
    length=64,
    dropout=0.3,
    # So that words are also read by their parts.
    merge_dropout=0.1,
    members=3,
    steps=600,
  )
  mine.optimizer.update(learning_rate=3e-3, warmup_steps=50)
  config.reward.function = 'bond_jax.rewards.gemma:scalar_head'
  config.reward.args = dict(path='{reference}/reward', batch=64)
  return config
