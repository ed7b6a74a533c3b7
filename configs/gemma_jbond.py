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

from configs import demo


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
  config = ml_collections.ConfigDict()
  config.seed = 0
  config.reference = '{workdir}'
  config.save_failure = 'stop'  # or 'go_on', when a save fails
  config.task = 'text'
  config.weights = unset()
  config.mesh = dict(data=-1, model=1)
  config.sampling_mesh = dict(data=-1, model=sampling_model)
  config.data = dict(
    name=unset(),
    data_dir='data',
    fields=dict(),
    splits=dict(),
    mix=dict(),
    bad_rows='stop',
  )
  config.tokenizer = dict(path=unset(), sha256='', vocab_size=vocab_size)
  config.model = dict(
    name=name,
    sizes=dict(),
    temperature=1.0,
    dtype='bfloat16',
    scan=True,
    remat='all',
    lora=dict(
      rank=lora_rank,
      alpha=float(lora_rank),
      targets='attn|mlp',
      weights='',  # a peft adapter that training starts from; '' = none
      exact_anchor=False,  # average the products of the adapters; see lora.py
    ),
  )
  # Rows are turns of a user; longer prompts are left out ('drop') or 'cut'.
  config.prompt = dict(kind='turn', length=512, longer='drop')
  config.length = 512
  config.stop = ()  # texts that end a completion beside EOS and end of turn
  config.chunk = 1024  # tokens; their logits are 1.07 GB at 262,144 pieces
  config.slots = 0
  config.reward = demo.reward(unset())
  # One that nothing is trained on; it may be the reward again.
  config.gold = dict(function=unset(), args=dict())
  config.algorithm = dict(
    name='jbond',
    args=dict(
      num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0
    ),
  )
  config.train = dict(
    steps=config_dict.placeholder(int),
    batch=128,
    rollouts=1,
    epochs=1,
    micro_batches=8,
    buckets=2,
    optimizer=dict(
      learning_rate=learning_rate,
      warmup_steps=100,
      decay_to=1.0,
      b1=0.9,
      b2=0.999,
      epsilon=1e-8,
      weight_decay=0.0,
      clip=1.0,
    ),
    save_every=100,
    skip_limit=3,  # steps in a row that may not be finite, and change nothing
    watch=demo.watch(),
    probe_prompts=128,
    probe_completions=2,
  )
  config.evaluate = dict(
    prompts=256,
    policy_completions=16,
    reference_completions=64,
    at_once=4,
    samples_shown=20,
  )
  return config
