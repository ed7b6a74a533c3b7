r"""The demo: J-BOND of a tiny Gemma 3 on movie-review sentences.

    make demo

Hardware: any laptop; two CPU cores take about five minutes. Real settings
differ in size alone: see the fields below.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  """Returns the settings of all four stages."""
  return ml_collections.ConfigDict(
    dict(
      seed=0,
      mesh=dict(data=-1, model=1),
      data=dict(name='movie_reviews', data_dir='data'),
      tokenizer=dict(vocab_size=1024),
      model=dict(
        name='gemma3_tiny',
        temperature=1.0,
        dtype='float32',
        scan=False,  # loops are slow on CPU
        remat=False,
      ),
      opening=4,  # pieces of a sentence that make a prompt
      length=24,  # new tokens at most
      chunk=24,  # positions whose logits exist at one time
      sft=dict(
        steps=700,
        batch=128,
        length=28,  # an opening and its completion
        optimizer=dict(
          learning_rate=2e-3,
          warmup_steps=30,
          decay_to=0.0,
          b1=0.9,
          b2=0.99,
          epsilon=1e-8,
          weight_decay=0.1,
          clip=1.0,
        ),
        save_every=100,
        validation_batches=4,
      ),
      reward_model=dict(order=2, min_count=2, alphas=(0.3, 1.0, 3.0)),
      reward=dict(
        function='bond_jax.rewards:ridge',
        args=dict(path='{workdir}/reward/model.npz'),
      ),
      gold=dict(function='bond_jax.rewards:vader', args=dict()),
      algorithm=dict(
        name='jbond',
        args=dict(backward_weight=0.5, anchor_rate=0.05, drift_weight=0.5),
      ),
      train=dict(
        steps=120,
        batch=128,
        micro_batches=1,
        optimizer=dict(
          learning_rate=1e-4,
          warmup_steps=5,
          decay_to=0.1,
          b1=0.9,
          b2=0.99,
          epsilon=1e-8,
          weight_decay=0.0,
          clip=1.0,
        ),
        save_every=20,
        probe_prompts=128,
        probe_completions=4,
      ),
      evaluate=dict(
        prompts=256,
        policy_completions=32,
        reference_completions=64,
        at_once=8,  # completions of each prompt in one call
        samples_shown=20,
      ),
    )
  )
