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

from configs import demo


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """The demo's settings, for one algorithm, with a Gemma as the reward."""
  config = demo.get_config(argument)
  with config.unlocked():
    config.reward_model = dict(
      kind='gemma',
      # 'bradley_terry'; 'margin', where the better text has to lead by `margin`
      # times the standardised gap of the ratings; 'regression' on ratings.
      loss='regression',
      margin=0.0,
      # Ratings are compared if they are this far apart, each training text with
      # so many others; rows with 'chosen' and 'rejected' are pairs already.
      min_gap=1.0,
      partners=8,
      # 'sft', 'random', or a checkpoint as config.weights has it.
      weights='random',
      # What differs from the run's own data, model, tokenizer and prompt.
      tokenizer=dict(path='', sha256='', vocab_size=8192),
      model=dict(sizes=dict(vocab_size=8192, layers=1, feed_forward=256)),
      pool='mean',  # the hidden states that the head reads: 'last' or 'mean'
      length=64,  # pieces of a text; rows with longer ones are left out
      dropout=0.3,  # share of the pieces that a text is read without
      # Share of a byte-pair vocabulary's merges left out, so that words are
      # also read by their parts.
      merge_dropout=0.1,
      # Models of which the score is the mean; each has rows of its own.
      members=3,
      steps=600,
      batch=128,  # pairs, or texts for regression, of each member
      optimizer=demo.adam(3e-3, warmup_steps=50, decay_to=0.0),
      save_every=100,
    )
  config.reward = demo.reward(
    'bond_jax.rewards.gemma:scalar_head', path='{reference}/reward', batch=64
  )
  return config
