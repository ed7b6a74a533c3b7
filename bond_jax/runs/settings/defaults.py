"""Every setting of a config, with its default and what it may be.

Configs say what differs from here. docs/config.md says what each setting means
and when to change it. A setting whose default is a type has none: a config or
the command line gives it.
"""

from collections.abc import Mapping
import functools
from typing import Any, NamedTuple

import ml_collections
from ml_collections import config_dict

from bond_jax.runs.settings import fields
from bond_jax.runs.settings.fields import (
  above,
  at_least,
  between,
  COUNT,
  FLAG,
  LIMIT,
  NAME,
  NUMBER,
  one_of,
  PART,
  Rule,
  several,
  SHARE,
  TABLE,
  TEXT,
  WHOLE,
)


class Setting(NamedTuple):
  """A default, or the type of a setting that has none, and what is allowed."""

  default: Any
  rule: Rule | Mapping[str, Any]


S = Setting

# Tables that users fill, without defaults.
_SPLITS = fields.optional(dict.fromkeys(('train', 'validation', 'test'), TEXT))
_SOURCE = {
  'name': TEXT, 'weight?': above(0), 'fields?': {'*': TEXT}, 'splits?': _SPLITS,
}  # fmt: skip
_PART = dict(function=TEXT, args=TABLE, weight=NUMBER)
_SIZES = fields.optional(dict(
  **dict.fromkeys(('vocab_size', 'features', 'layers', 'heads', 'kv_heads',
                   'feed_forward', 'window'), COUNT),
  **dict.fromkeys(('query_scale', 'attention_softcap', 'final_softcap',
                   'local_rope_base', 'global_rope_base', 'global_rope_scale'),
                  above(0)),
  **dict.fromkeys(('qk_norm', 'post_norms', 'gating_transposed'), FLAG),
  head_size=fields.EVEN, pattern=several(one_of('local', 'global'), 1),
))  # fmt: skip

# Of Adam; the cosine ends at decay_to times the learning rate.
_OPTIMIZER = dict(
  learning_rate=S(float, above(0)),
  warmup_steps=S(0, at_least(0)),
  decay_to=S(0.0, SHARE),
  b1=S(0.9, PART),
  b2=S(0.99, PART),
  epsilon=S(1e-8, above(0)),
  weight_decay=S(0.0, at_least(0, NUMBER)),
  clip=S(1.0, above(0, LIMIT)),  # global norm
)
_REWARD = dict(
  function=S(str, TEXT),  # module:function, which makes it
  args=S({}, TABLE),
  parts=S({}, {'*': _PART}),  # several in the place of one
  missing_eos_penalty=S(0.0, NUMBER),  # taken off completions that were cut
  length_penalty=S(0.0, NUMBER),  # taken off per token
  failure=S('stop', one_of('stop', 'skip')),
  retries=S(0, at_least(0)),
  timeout=S(0.0, between(0, 1e9)),  # seconds for a batch; 0 = none
  # Of a judge: the reference's completions that evaluation compares with.
  opponents=S(0, at_least(0)),
)
_WARNINGS = one_of('kl', 'entropy', 'length', 'signal', 'anchor', 'speed',
                   'skipped')  # fmt: skip

TREE = dict(
  seed=S(0, at_least(0)),
  # The run whose sft and reward stages this one starts from: its own.
  reference=S('{workdir}', NAME),
  save_failure=S('stop', one_of('stop', 'go_on')),
  task=S('text', one_of('text', 'enumerable')),
  # Devices along each axis; data=-1 takes all. sharding.make_mesh checks them.
  mesh=dict(data=S(-1, WHOLE), model=S(1, WHOLE)),
  sampling_mesh=dict(data=S(-1, WHOLE), model=S(1, WHOLE)),
  data=dict(
    name=S(str, TEXT),  # see docs/data.md
    data_dir=S('data', TEXT),  # of TFDS
    fields=S({}, {'*': TEXT}),  # our names of fields -> theirs: text='document'
    splits=S({}, _SPLITS),  # our splits -> theirs: validation='train[:5%]'
    mix=S({}, {'*': _SOURCE}),  # several in the place of one
    bad_rows=S('stop', one_of('stop', 'skip')),
    # Rows with completions and rewards, on which train draws none: offline.
    stored=S('', TEXT),
  ),
  weights=S('', TEXT),  # a checkpoint that the model starts from; '' = none
  # The reference, if it is another model: weights, or a run's stage; '' = none.
  teacher=S('', TEXT),
  # path: a SentencePiece file; '' = the sft stage trains one on the data.
  tokenizer=dict(
    path=S('', TEXT),
    sha256=S('', fields.SHA256),
    vocab_size=S(int, at_least(5)),
  ),
  model=dict(
    name=S(str, NAME),  # see models/gemma/configs.py
    sizes=S({}, _SIZES),  # of a Gemma, instead of those of the name
    temperature=S(1.0, at_least(0, NUMBER)),  # of sampling and of scoring alike
    dtype=S('bfloat16', one_of('float32', 'bfloat16')),  # of the computation
    scan=S(True, FLAG),  # loop over layers: compiles faster
    remat=S('all', one_of('none', 'products', 'all')),  # in the backward pass
    # Adapters instead of all weights; rank 0 = all weights.
    lora=dict(
      rank=S(0, at_least(0)),
      alpha=S(16.0, at_least(0, NUMBER)),
      targets=S('attn|mlp', TEXT),  # a regular expression
      weights=S('', TEXT),  # a peft adapter that training starts from
      exact_anchor=S(False, FLAG),  # average products of adapters, not adapters
    ),
  ),
  prompt=dict(
    kind=S('turn', one_of('opening', 'text', 'turn')),
    length=S(512, at_least(2)),
    longer=S('drop', one_of('drop', 'cut')),
  ),
  length=S(512, COUNT),  # new tokens at most
  stop=S((), several(NAME, example="('Question:',)")),  # texts that end one
  chunk=S(1024, COUNT),  # tokens whose logits exist at one time, per device
  slots=S(0, at_least(0)),  # completions decoded side by side; 0 = all
  sft=dict(
    steps=S(int, COUNT),
    batch=S(64, COUNT),
    micro_batches=S(1, COUNT),
    target=S('completion', one_of('text', 'completion')),
    length=S(512, COUNT),  # pieces of a text, EOS included; the rest is cut
    optimizer=_OPTIMIZER,
    save_every=S(100, COUNT),
    validation_batches=S(4, COUNT),
  ),
  reward_model=dict(  # one of them
    ridge=dict(
      kind=S('ridge', one_of('ridge', 'gemma')),
      order=S(3, COUNT),  # pieces of the longest n-grams
      min_count=S(2, COUNT),  # texts that an n-gram must be in
      alphas=S((0.25, 0.5, 1.0, 2.0), several(at_least(0, NUMBER), 1)),
    ),
    gemma=dict(
      kind=S('gemma', one_of('ridge', 'gemma')),
      loss=S('bradley_terry', one_of('bradley_terry', 'margin', 'regression')),
      margin=S(0.0, at_least(0, NUMBER)),
      min_gap=S(1.0, at_least(0, NUMBER)),  # of ratings that make a pair
      partners=S(8, COUNT),  # pairs that a training text is in, at most
      weights=S(str, NAME),  # 'sft', 'random' or a checkpoint
      pool=S('last', one_of('last', 'mean')),
      length=S(512, COUNT),
      dropout=S(0.0, PART),  # share of the pieces that are left out in training
      merge_dropout=S(0.0, PART),  # share of the vocabulary's merges, likewise
      members=S(1, COUNT),  # models of which the score is the mean
      steps=S(int, COUNT),
      batch=S(128, COUNT),
      micro_batches=S(1, COUNT),
      optimizer=_OPTIMIZER,
      save_every=S(100, COUNT),
    ),
  ),
  reward=_REWARD,
  # A reward that nothing is trained on.
  gold=dict(function=S(str, TEXT), args=S({}, TABLE)),
  # A file in bond_jax/algorithms, and the arguments of its `make`.
  algorithm=dict(name=S(str, TEXT), args=S({}, TABLE)),
  train=dict(
    steps=S(int, COUNT),
    batch=S(128, COUNT),  # prompts per step
    rollouts=S(1, COUNT),  # batches drawn before an iteration's updates
    epochs=S(1, COUNT),  # updates on each of them, before the anchor moves
    micro_batches=S(1, COUNT),
    buckets=S(1, COUNT),  # lengths to which micro-batches are padded
    optimizer=dict(
      **_OPTIMIZER,
      decay=S('cosine', one_of('cosine', 'linear')),
      # Of all weights but the embedding, times the learning rate.
      layer_rate=S(1.0, SHARE),
    ),
    # The moments and the schedule begin anew with each iteration.
    restart=S(False, FLAG),
    save_every=S(100, COUNT),
    skip_limit=S(0, at_least(0)),  # steps in a row that may not be finite
    # When training warns of what goes wrong slowly.
    watch=dict(
      kl=S(10.0, at_least(0, LIMIT)),  # nats to the reference
      entropy=S(0.5, SHARE),  # per token, share of what it was at first
      length=S(2.0, at_least(1, LIMIT)),  # times as long or short as at first
      signal=S(0.05, SHARE),  # share of prompts with a signal
      speed=S(2.0, at_least(1, LIMIT)),  # times the seconds of a step at first
      stop=S((), several(_WARNINGS, example="('kl', 'entropy')")),
    ),
    probe_prompts=S(128, COUNT),  # validation prompts of the curves
    probe_completions=S(2, COUNT),
  ),
  evaluate=dict(
    prompts=S(256, at_least(2)),  # of the test split
    policy_completions=S(16, COUNT),  # of each
    reference_completions=S(64, at_least(2)),  # the Best-of-N curve needs them
    at_once=S(4, COUNT),  # completions of each prompt in one call
    # No call is begun later: with fewer completions if so; 0 = all of them.
    minutes=S(0.0, at_least(0, NUMBER)),
    samples_shown=S(20, at_least(0)),
  ),
  enumerable=dict(
    seed=S(0, at_least(0)),  # of the reference's parameters and the rewards
    prompts=S(8, COUNT),
    vocab=S(8, at_least(2)),  # of completions, EOS included
    best_of=S(4, at_least(1, NUMBER)),  # the N that the KLs are taken to
    # Of the laws that equilibrium_kl and tilt_kl are taken to; 0 = of none.
    kl_weight=S(0.0, at_least(0, NUMBER)),
  ),
)

# What a config has for each task.
COMMON = (
  'seed', 'reference', 'save_failure', 'task', 'mesh', 'sampling_mesh', 'model',
  'length', 'chunk', 'slots', 'train', 'algorithm',
)  # fmt: skip
TASKS = {
  'text': ('data', 'weights', 'teacher', 'tokenizer', 'prompt', 'stop',
           'reward', 'gold', 'evaluate'),
  'enumerable': ('enumerable',),
}  # fmt: skip
PROBE = ('probe_prompts', 'probe_completions')  # of train, for text alone
TEXT_NEEDS = (*TASKS['text'], *(f'train.{name}' for name in PROBE))


def make(
  task: str, *, sft: bool = False, reward_model: str = ''
) -> ml_collections.ConfigDict:
  """The config of a task, 'text' or 'enumerable', every setting at its default.

  `sft`: with a supervised stage. `reward_model`: 'ridge' or 'gemma', of a stage
  that trains one; '' = none.
  """
  names = {*COMMON, *TASKS[task], *(['sft'] if sft else [])}
  tree = {name: part for name, part in TREE.items() if name in names}
  if reward_model:
    tree['reward_model'] = TREE['reward_model'][reward_model]
  config = ml_collections.ConfigDict(_defaults(tree))
  config.task = task
  if task != 'text':
    for name in PROBE:
      del config.train[name]
  return config


def reward(function: str, /, **args: Any) -> dict[str, Any]:
  """The section `reward`, of a function and its arguments."""
  return {**_defaults(_REWARD), 'function': function, 'args': args}


def _defaults(tree: Mapping[str, Any]) -> dict[str, Any]:
  def of(part):
    if not isinstance(part, Setting):
      return _defaults(part)
    if isinstance(part.default, type):
      return config_dict.placeholder(part.default)
    return dict(part.default) if part.default == {} else part.default

  return {name: of(part) for name, part in tree.items()}


def filled(config: Mapping[str, Any]) -> dict[str, Any]:
  """A saved config with the defaults of settings that are newer than it."""
  names = {*COMMON, *TASKS.get(str(config.get('task', 'text')), ())}
  tree = {k: v for k, v in TREE.items() if k in names or k in config}
  section = config.get('reward_model')
  kind = section.get('kind') if isinstance(section, Mapping) else ''
  tree['reward_model'] = TREE['reward_model'].get(str(kind), {})
  return _filled(config, tree)


def _filled(config, tree):
  found = dict(config)
  for name, part in tree.items():
    if not isinstance(part, Setting):
      if isinstance(config.get(name), Mapping):
        found[name] = _filled(config[name], part)
    elif name not in PROBE and not isinstance(part.default, type):
      found.setdefault(name, part.default)
  return found


def _rules(tree: Mapping[str, Any]) -> dict[str, Any]:
  return {
    f'{name}?' if name in PROBE else name: (
      part.rule if isinstance(part, Setting) else _rules(part)
    )
    for name, part in tree.items()
  }


# What differs from the run's, for the reward model alone.
_OWN = {
  f'{name}?': fields.optional(_rules(TREE[name]))
  for name in ('data', 'tokenizer', 'model', 'prompt')
}
del _OWN['data?']['stored?']
RULES = fields.optional(_rules(TREE))
_KINDS = RULES['reward_model?']
RULES['reward_model?'] = fields.Kinds({
  'ridge': (_KINDS['ridge'], 'configs/demo.py'),
  'gemma': (_KINDS['gemma'] | _OWN, 'configs/demo_learned_reward.py'),
})  # fmt: skip
check = functools.partial(fields.check, rules=RULES)
