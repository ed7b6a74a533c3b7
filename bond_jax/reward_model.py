"""The second stage: a model of what people prefer, to be the reward.

`python -m bond_jax.reward_model --config=configs/demo.py --workdir=runs/demo`
leaves in reward/ what `config.reward_model.kind` names:

  ridge: a ridge regression of ratings on n-grams of the run's own pieces, for
    `rewards.ridge.ridge`. Seconds.
  gemma: a Gemma with a scalar head, trained on preferences or ratings, for
    `rewards.gemma.scalar_head`.

Both write reward/summary.json.
"""

from bond_jax.reward_models import stage
from bond_jax.runs import command

if __name__ == '__main__':
  command.run(stage.main, __doc__)
