r"""BOND of summaries, the setting of BOND's Figures 2 and 4.

    launch/tpu_vm.sh train --config=configs/xsum_bond.py:backward_weight=0.5 \
      --workdir=runs/xsum_bond --config.reference=runs/xsum \
      --config.weights=... --config.tokenizer.path=... \
      --config.reward.args.path=... --config.gold.function=... \
      --config.train.steps=...

The paper (arXiv 2407.14622, section 4): the reference is a model that was
trained on XSum (xsum_sft.py), the reward says whether the document entails the
summary, N = 8, the quantile is counted among k = 16 completions, and the
weight of the backward KL is 0, 0.5 or 1. Model, optimizer, batch and steps are
not in the paper: those here are ours. reward.args.path is a classifier of
natural language inference, a folder or owner/name@commit. Hardware, estimated
and not yet tried: a host with 8 TPU v5e chips.
"""

from configs import gemma_jbond


def get_config(argument: str = 'backward_weight=0.5'):
  _, _, weight = argument.partition('backward_weight=')
  config = gemma_jbond.get_config(
    'gemma_2b', vocab_size=256_000, learning_rate=3e-6, lora_rank=0
  )
  config.data.update(
    name='xsum', fields=dict(text='document', completion='summary')
  )
  config.prompt.length = 1024
  config.length = 64
  config.reward.update(
    function='bond_jax.rewards.hf:entailment',
    args=dict(
      path=gemma_jbond.unset(),
      premise='text',  # what data.fields makes of the document
      length=1024,
    ),
  )
  config.algorithm = dict(
    name='bond',
    args=dict(
      n=8,
      backward_weight=float(weight or 0.5),
      drift_weight=0.0,
      num_policy=1,
      quantile='monte_carlo',
      num_quantile=16,
      zero='half',
      second_term=False,
      anchor='fixed',
    ),
  )
  return config
