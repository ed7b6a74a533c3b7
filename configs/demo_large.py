r"""The demo with four times the parameters: a teacher for the demo's model.

    python -m bond_jax.sft --config=configs/demo_large.py --workdir=runs/large

The vocabulary is the demo's, trained on the same sentences. What can be done
with it is in docs/teacher.md. Hardware: any laptop; two CPU cores take about
five minutes for the sft stage.
"""

import ml_collections

from configs import demo


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """Returns the settings of all four stages, for one algorithm."""
  config = demo.get_config(argument)
  with config.unlocked():
    config.model.sizes = dict(
      features=256, heads=8, kv_heads=4, feed_forward=1280
    )
  # Wider layers want smaller steps.
  config.sft.optimizer.learning_rate = 1e-2
  return config
