r"""How far a learnt reward can be trusted: J-BOND and RLOO, driven too far.

    make overoptimisation

One run is one argument, `--config=configs/overoptimisation.py:run=rloo`. The
reward is that of configs/demo_learned_reward.py, but the steps are larger, the
batches smaller and the anchor follows faster, so that a short run goes far
from the reference. VADER, which nothing is trained on, judges on the way, on
openings of the test split, which the reward model was not chosen on either.
"""

import ml_collections

from configs import demo_learned_reward

# Algorithm, steps, completions per prompt, and what differs from its arguments.
# All draw 57,600 completions.
RUNS = dict(
  jbond_0=('jbond', 300, dict(anchor_rate=0.05, drift_weight=0.0)),
  jbond_1=('jbond', 300, dict(anchor_rate=0.05, drift_weight=1.0)),
  rloo=('rloo', 450, dict(kl_weight=0.2)),
)


def get_config(argument: str = 'run=jbond_0') -> ml_collections.ConfigDict:
  """The settings of one run; the start's are those of the learnt reward."""
  _, _, name = argument.partition('run=')
  # A name that is not here is refused, as an algorithm that is not there.
  algorithm, steps, args = RUNS.get(name, (name, 1, {}))
  config = demo_learned_reward.get_config(f'algorithm={algorithm}')
  # Runs draw apart, so that their reference completions may be pooled.
  config.seed = list(RUNS).index(name) if name in RUNS else 0
  config.algorithm.args.update(args)
  with config.unlocked():
    config.data.splits = dict(validation='test')  # openings of the probe
  config.train.update(dict(
    steps=steps,
    batch=64,
    optimizer=dict(learning_rate=1e-3, decay_to=1.0),
    save_every=max(1, steps // 20),
    probe_prompts=256,
    probe_completions=4,
  ))  # fmt: skip
  config.evaluate.update(dict(policy_completions=16, reference_completions=64))
  return config
