"""J-BOND of Gemma's public weights with the BOND paper's settings.

Not a config by itself: gemma_2b_jbond.py and its neighbours call it. The paper
(arXiv 2407.14622, section 7) gives batch 128, Adam at 3e-6 after 100 warm-up
steps, Jeffreys weight 0.5, anchor rate 0.02 and gamma 0; it publishes neither
prompts nor reward model nor the number of steps, so these have no default:

    --config.weights=...        an official checkpoint or a Hugging Face folder
    --config.tokenizer.path=... the SentencePiece file that came with it
    --config.data.name=...      prompts/{split}.jsonl, {"text": ...} per line;
                                others, and mixtures, are in docs/data.md
    --config.reward.function=.. module:function, a reward on text
    --config.gold.function=...  another, which nothing is trained on
    --config.train.steps=...    a few thousand
"""

import ml_collections
from ml_collections import config_dict

from bond_jax.runs.settings import defaults


def unset():
  """A text without a default; each call makes a field of its own."""
  return config_dict.placeholder(str)


def get_config(
  name: str,
  *,
  vocab_size: int,
  learning_rate: float,
  lora_rank: int,
  sampling_model: int = 1,
) -> ml_collections.ConfigDict:
  """The settings of the train and evaluate stages.

  Args:
    name: of the model, see models/configs.py.
    vocab_size: pieces of its tokenizer.
    learning_rate: of Adam.
    lora_rank: 0 trains all parameters.
    sampling_model: devices over which the weights are split while sampling:
      as many as it takes to hold them in bfloat16, beside what is trained.
  """
  config = defaults.make('text')
  config.weights = unset()
  config.sampling_mesh.model = sampling_model
  config.tokenizer.update(path=unset(), vocab_size=vocab_size)
  config.model.name = name
  config.model.lora.update(rank=lora_rank, alpha=float(lora_rank))
  # The logits of 1,024 tokens are 1.07 GB at 262,144 pieces.
  config.algorithm.update(
    name='jbond',
    args=dict(
      num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0
    ),
  )
  config.train.update(micro_batches=8, buckets=2, skip_limit=3)
  config.train.optimizer.update(
    learning_rate=learning_rate, warmup_steps=100, decay_to=1.0, b2=0.999
  )
  return config
