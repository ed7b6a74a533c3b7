"""What a config may hold: every setting has a range, and every name is known.

All bad values go through `checks.check`, which every stage calls first.
"""

import copy
import importlib
import math
import pathlib

import language
import ml_collections
import pytest
import toy

from bond_jax.data import examples, sources
from bond_jax.errors import UserError
from bond_jax.models import scalar_head
from bond_jax.models.gemma import model as gemma
from bond_jax.runs.settings import defaults, fields
from bond_jax.training import checks, setups, watch
from configs import demo, demo_learned_reward, overoptimisation
from configs import ultrafeedback_wind as wind

# Not figures.py, which holds many runs, nor the body of gemma*_jbond.py.
CONFIGS = sorted(
  {p.stem for p in pathlib.Path(toy.ROOT, 'configs').glob('*.py')}
  - {'figures', 'gemma_jbond'}
)
ARGUMENTS = [
  *((name, '') for name in CONFIGS),
  *(('demo', f'algorithm={name}') for name in demo.ALGORITHMS),
  *(('overoptimisation', f'run={name}') for name in overoptimisation.RUNS),
  *(('ultrafeedback_wind', f'algorithm={name}') for name in wind.ALGORITHMS),
]
OPTIMIZERS = 'sft.optimizer', 'train.optimizer', 'reward_model.optimizer'

NO_NUMBER = ['1', None, True, math.nan, [1]]
NO_WHOLE = [*NO_NUMBER, 1.5, 10**18, math.inf]
NO_FINITE = [*NO_NUMBER, math.inf, -math.inf, 10**400]
NO_TEXT = [1, None, 'a\0b', '\ud800', ['x']]
NO_COUNT = [*NO_WHOLE, 0, -1]

# What is refused, and of which settings.
BAD = [
  (
    NO_COUNT,
    """
    length chunk sft.steps sft.batch sft.length sft.save_every
    sft.validation_batches train.steps train.batch train.rollouts train.epochs
    train.micro_batches sft.micro_batches reward_model.micro_batches
    train.buckets train.save_every train.probe_prompts
    train.probe_completions evaluate.policy_completions evaluate.at_once
    enumerable.prompts reward_model.order reward_model.min_count
    reward_model.partners reward_model.length reward_model.members
    reward_model.steps reward_model.batch reward_model.save_every
    tokenizer.vocab_size reward_model.tokenizer.vocab_size
    model.sizes.vocab_size model.sizes.features model.sizes.layers
    model.sizes.heads model.sizes.kv_heads model.sizes.feed_forward
    model.sizes.window
    """,
  ),
  (
    [*NO_COUNT, 1],
    'evaluate.prompts evaluate.reference_completions prompt.length'
    ' enumerable.vocab',
  ),
  ([*NO_COUNT, 3], 'model.sizes.head_size'),
  (
    [*NO_WHOLE, -1],
    'seed slots reward.retries reward.opponents train.skip_limit'
    ' evaluate.samples_shown enumerable.seed model.lora.rank',
  ),
  (
    [*NO_WHOLE, -2],
    'mesh.data mesh.model sampling_mesh.data sampling_mesh.model',
  ),
  ([*NO_WHOLE, -1], ' '.join(f'{x}.warmup_steps' for x in OPTIMIZERS)),
  (
    [*NO_FINITE, -0.5],
    'reward_model.margin reward_model.min_gap model.lora.alpha'
    ' enumerable.kl_weight evaluate.minutes'
    + ''.join(f' {x}.weight_decay' for x in OPTIMIZERS),
  ),
  (
    [*NO_FINITE, 0, -1e-3],
    'model.temperature model.sizes.query_scale model.sizes.attention_softcap'
    ' model.sizes.final_softcap model.sizes.local_rope_base'
    ' model.sizes.global_rope_base model.sizes.global_rope_scale'
    ' data.mix.weight'
    + ''.join(f' {x}.{y}' for x in OPTIMIZERS
              for y in ('learning_rate', 'epsilon')),
  ),
  (
    [*NO_FINITE, -1, 2],
    'train.optimizer.layer_rate '
    + ' '.join(f'{x}.decay_to' for x in OPTIMIZERS),
  ),
  (
    [*NO_FINITE, -0.1, 1, 2],
    'reward_model.dropout reward_model.merge_dropout '
    + ' '.join(f'{x}.{y}' for x in OPTIMIZERS for y in ('b1', 'b2')),
  ),
  (
    [*NO_NUMBER, 0, -1, -math.inf],
    ' '.join(f'{x}.clip' for x in OPTIMIZERS)
  ),
  ([*NO_FINITE, -0.1, 1.1], 'train.watch.entropy train.watch.signal'),
  ([*NO_NUMBER, -1, -math.inf], 'train.watch.kl'),
  ([*NO_NUMBER, 0, 0.5, -math.inf], 'train.watch.length train.watch.speed'),
  ([*NO_FINITE, -1, 1e12], 'reward.timeout'),
  ([*NO_FINITE, 0.5, -4], 'enumerable.best_of'),
  (
    NO_FINITE,
    'reward.missing_eos_penalty reward.length_penalty reward.parts.weight'
  ),
  (
    [0, 'False', None],
    'train.restart model.scan model.lora.exact_anchor model.sizes.qk_norm'
    ' model.sizes.post_norms model.sizes.gating_transposed',
  ),
  (
    NO_TEXT,
    """
    data.name data.data_dir data.fields.text data.splits.train data.splits.test
    data.splits.validation data.mix.name data.mix.fields.text
    data.mix.splits.test data.mix.splits.train data.mix.splits.validation
    weights teacher data.stored tokenizer.path
    reward_model.tokenizer.path model.lora.targets model.lora.weights
    reward.function gold.function reward.parts.function task algorithm.name
    """,
  ),
  ([*NO_TEXT, ''], 'reference model.name reward_model.weights'
   ' reward_model.model.name'),
  ([*NO_TEXT, 'abc', 'A' * 64], 'tokenizer.sha256'
   ' reward_model.tokenizer.sha256'),
  ([*NO_TEXT, 'goon', 'STOP', ''], 'save_failure'),
  ([*NO_TEXT, 'bf16', 'fp32', 'float64', 'float', ''], 'model.dtype'),
  ([*NO_TEXT, 'some', ''], 'model.remat'),
  ([*NO_TEXT, 'turns', ''], 'prompt.kind'),
  ([*NO_TEXT, 'keep', ''], 'prompt.longer'),
  ([*NO_TEXT, 'step', ''], 'train.optimizer.decay'),
  ([*NO_TEXT, 'drop', ''], 'data.bad_rows'),
  ([*NO_TEXT, 'answer', ''], 'sft.target'),
  ([*NO_TEXT, 'go_on', ''], 'reward.failure'),
  ([*NO_TEXT, 'lasso', ''], 'reward_model.kind'),
  ([*NO_TEXT, 'dpo', ''], 'reward_model.loss'),
  ([*NO_TEXT, 'first', ''], 'reward_model.pool'),
  (
    [(), 3, ['a'], None, (1, -1.0), (math.nan,), '0.5'],
    'reward_model.alphas',
  ),
  (
    [('kl,entropy',), ('kl', 'luck'), 'kl', (1,), None, ('',)],
    'train.watch.stop',
  ),
  ([(), ('globe',), 'local', None], 'model.sizes.pattern'),
  (['x', ('x', 1), ('',), None, {}], 'stop'),
  (
    [3, 'x', [], None],
    'algorithm.args reward.args gold.args reward.parts.args',
  ),
]  # fmt: skip
CASES = [(path, bad) for bad, paths in BAD for path in paths.split()]
# Tables with names of the user's: a name for a test of what is in them.
FREE = {
  'data.mix': {'some': {'name': 'x', 'fields': {}, 'splits': {}}},
  'reward.parts': {'some': {'function': 'x', 'args': {}, 'weight': 1}},
}


def of(path):
  """The config whose settings `path` belongs to."""
  if path.startswith('enumerable'):
    return language.full_config('algorithm=jbond')
  config = toy.get_config(toy.folder())
  if path.removeprefix('reward_model.') not in ('order', 'min_count', 'alphas'):
    with config.unlocked():
      config.reward_model = demo_learned_reward.get_config().reward_model
  return config


def change(config, path, value):
  """Sets `path` (a.b.c) of a config, also one that it does not have."""
  *sections, key = path.split('.')
  for i, section in enumerate(sections):
    free = FREE.get('.'.join(sections[: i + 1]))
    if free:
      with config.unlocked():
        config[section] = copy.deepcopy(free)
    config = config[section]
    if free:
      config = config['some']
  with config.unlocked():
    if key in config:
      del config[key]  # else True becomes 1.0
    config[key] = value


def refused(config) -> str:
  with pytest.raises(UserError) as e:
    checks.check(config)
  assert '\n' not in str(e.value)
  return str(e.value)


@pytest.mark.parametrize('path, bad', CASES, ids=[path for path, _ in CASES])
def test_what_no_stage_could_work_with_is_refused(path, bad):
  for value in bad:
    config = of(path)
    change(config, path, value)
    said = refused(config).replace('.some.', '.')
    # Of a mesh the shape is said: data=0 x model=1.
    assert path in said or f'{path.rpartition(".")[2]}=' in said


def leaves(rules, above=''):
  """The names of all settings that there are rules for."""
  for key, rule in rules.items():
    path = f'{above}{key.removesuffix("?")}'.replace('.*', '')
    path = path.replace('fields', 'fields.text') if key == '*' else path
    if isinstance(rule, fields.Rule):
      yield path
    elif isinstance(rule, fields.Kinds):
      yield f'{path}.kind'
      for table, _ in rule.of.values():
        yield from leaves(table, f'{path}.')
    else:
      yield from leaves(rule, f'{path}.')


def test_every_setting_is_tried():
  """A new one has a rule, and bad values above; but for copies of sections."""
  copies = 'reward_model.data', 'reward_model.model', 'reward_model.prompt'
  tried = {path for path, _ in CASES}
  wanted = {x for x in leaves(defaults.RULES) if not x.startswith(copies)}
  assert wanted - tried == set()
  assert tried - wanted <= {'reward_model.model.name'}


@pytest.mark.parametrize('name, argument', ARGUMENTS)
def test_every_config_is_well_once_it_is_filled_in(name, argument):
  config = importlib.import_module(f'configs.{name}').get_config(
    *([argument] if argument else [])
  )

  def fill(node, rules):
    for key, value in node.items():
      rule = rules.get(key, rules.get(f'{key}?', rules.get('*')))
      if isinstance(value, ml_collections.ConfigDict):
        fill(value, rule if isinstance(rule, dict) else {})
      elif value is None:
        node[key] = 1 if rule and rule.allows(1) else 'x'

  defaults.check(config.to_dict(), defaults.COMMON, unset=True)
  with config.unlocked():
    fill(config, defaults.RULES)
  defaults.check(config.to_dict(), defaults.COMMON)


def test_the_toy_is_well():
  checks.check(toy.get_config(toy.folder()))


@pytest.mark.parametrize(
  'path, values',
  [
    ('train.optimizer.clip', [1, 0.5, math.inf]),
    ('train.watch.kl', [0, math.inf]),
    ('train.watch.stop', [(), ('kl', 'skipped'), ['anchor']]),
    ('model.sizes', [{}, {'layers': 2, 'window': 4}]),
    ('data.mix', [{'a': {'name': 'x', 'weight': 2}}]),
    ('data.fields', [{}, {'what': 'ever'}]),
    ('reward.args', [{}, {'what': None}]),
    ('reward_model.alphas', [(1, 2.0), [0.5], (0,)]),
    ('stop', [(), ('\n', ' a'), ['x']]),
    ('algorithm.args', [{}, {'what': 'ever'}]),
    ('tokenizer.sha256', ['', 'a0' * 32]),
  ],
)
def test_what_is_in_its_range_passes(path, values):
  for value in values:
    config = toy.get_config('nowhere')
    change(config, path, value)
    defaults.check(config.to_dict(), (*defaults.COMMON, *defaults.TEXT_NEEDS))


@pytest.mark.parametrize(
  'path, meant',
  [
    ('sed', 'seed'),
    ('trian', 'train'),
    ('train.stepz', 'steps'),
    ('train.optimizer.momentum', 'known are'),
    ('train.optimizer.learning_rat', 'learning_rate'),
    ('train.watch.entropie', 'entropy'),
    ('model.lora.rnak', 'rank'),
    ('model.sizes.layer', 'layers'),
    ('model.sizes.used_vocab', 'known are'),
    ('reward.lenght_penalty', 'length_penalty'),
    ('reward.parts.wieght', 'weight'),
    ('gold.arg', 'args'),
    ('data.feilds', 'fields'),
    ('data.splits.valid', 'validation'),
    ('data.mix.weigth', 'weight'),
    ('reward_model.min_cuont', 'known are'),  # of the other kind
    ('reward_model.los', 'loss'),
    ('enumerable.vocabs', 'vocab'),
    ('evaluate.prompt', 'prompts'),
  ],
)
def test_a_name_that_nothing_reads_is_refused_with_the_nearest(path, meant):
  config = of(path)
  change(config, path, 1)
  said = refused(config)
  name = path.rpartition('.')[2]
  assert f'has {name!r}, which nothing reads' in said
  assert meant in said.partition('which nothing reads')[2]


@pytest.mark.parametrize(
  'path',
  ['seed', 'train', 'train.batch', 'train.probe_prompts', 'model.lora.rank',
   'prompt', 'reward_model.kind', 'reward_model.pool', 'mesh', 'slots',
   'enumerable', 'enumerable.vocab'],
)  # fmt: skip
def test_what_is_missing_is_named(path):
  config = of(path)
  *above, name = path.split('.')
  inside = config
  for key in above:
    inside = inside[key]
  with inside.unlocked():
    del inside[name]
  where = '.'.join(['config', *above])
  said = refused(config)
  assert where in said and f'has no {name!r}, which must be' in said


@pytest.mark.parametrize('name', ['sft', 'reward_model', 'data', 'evaluate'])
def test_a_section_that_no_task_needs_may_be_missing(name):
  config = toy.get_config('nowhere').to_dict()
  del config[name]
  defaults.check(config, defaults.COMMON)


@pytest.mark.parametrize(
  'module, kind, example',
  [(demo, 'gemma', 'demo_learned_reward.py'),
   (demo_learned_reward, 'ridge', 'demo.py')],
)  # fmt: skip
def test_the_settings_of_another_kind_of_reward_model(module, kind, example):
  config = module.get_config()
  config.reward_model.kind = kind
  said = refused(config)
  assert f"config.reward_model (kind '{kind}', as in configs/{example})" in said


@pytest.mark.parametrize(
  'path, choices',
  [
    ('prompt.kind', examples.KINDS),
    ('prompt.longer', examples.FATES),
    ('model.remat', gemma.REMAT),
    ('data.bad_rows', sources.BAD_ROWS),
    ('reward_model.gemma.pool', scalar_head.POOLS),
    ('train.watch.stop', watch.ADVICE),
  ],
)
def test_the_choices_are_those_of_the_code(path, choices):
  setting = defaults.TREE
  for name in path.split('.'):
    setting = setting[name]
  rule = fields.one_of(*choices)
  if path == 'train.watch.stop':
    rule = fields.several(rule, example="('kl', 'entropy')")
  assert setting.rule.says == rule.says


@pytest.mark.parametrize(
  'algorithm, name, bad',
  [
    ('jbond', 'num_anchor', [*NO_WHOLE, 1]),
    ('jbond', 'backward_weight', [*NO_FINITE, -0.1, 1.1]),
    ('jbond', 'anchor_rate', [*NO_FINITE, -0.1, 2]),
    ('jbond', 'drift_weight', [*NO_FINITE, -1]),
    ('bond', 'n', [*NO_WHOLE, 1]),
    ('bond', 'backward_weight', [*NO_FINITE, 1.1]),
    ('bond', 'drift_weight', [*NO_FINITE, -1]),
    ('bond', 'num_policy', NO_COUNT),
    ('bond', 'quantile', [*NO_TEXT, 'median']),
    ('bond', 'num_quantile', NO_COUNT),
    ('bond', 'zero', [*NO_TEXT, 'none']),
    ('bond', 'second_term', [0, None, 'True']),
    ('bond', 'anchor', [*NO_TEXT, '', 'ema:2', 'ema:nan', 'periodic:0', 'ema']),
    ('best_of_n', 'n', NO_COUNT),
    ('best_of_n', 'anchor', [*NO_TEXT, 'moving']),
    ('vbon', 'n', [*NO_WHOLE, 1]),
    ('vbon', 'num_quantile', NO_COUNT),
    ('bonbon', 'n', [*NO_WHOLE, 1]),
    ('bonbon', 'sft_weight', [*NO_FINITE, -0.1, 1.1]),
    ('wind', 'kl_weight', [*NO_FINITE, -1]),
    ('wind', 'step_size', [*NO_FINITE, 0, -1]),
    ('wind', 'risk', [*NO_TEXT, 'cubic']),
    ('wind', 'constant', [*NO_TEXT, 'one']),
    ('wind', 'num_anchor', [*NO_WHOLE, 1]),
    ('wind', 'rows', [*NO_WHOLE, 0, 1, 5]),
    ('sppo', 'step_size', [*NO_FINITE, 0, -1]),
    ('sppo', 'num_anchor', [*NO_WHOLE, 1]),
    ('sppo', 'rows', [*NO_TEXT, 'some']),
    ('rloo', 'num_policy', [*NO_WHOLE, 1]),
    ('rloo', 'kl_weight', [*NO_FINITE, -1]),
    ('tilt', 'num_policy', [*NO_WHOLE, 1]),
    ('tilt', 'num_anchor', [*NO_WHOLE, 0]),
    ('tilt', 'kl_weight', [*NO_FINITE, 0, -1]),
    ('tilt', 'quantile', [*NO_TEXT, 'all']),
    ('qrpo', 'num_policy', [*NO_WHOLE, -1]),
    ('qrpo', 'num_anchor', [*NO_WHOLE, 0, 1]),
    ('qrpo', 'rows', [*NO_WHOLE, 0, 13]),
    ('qrpo', 'transform', [*NO_TEXT, 'square']),
    ('qrpo', 'kl_weight', [*NO_FINITE, 0, -1]),
    ('reinforce', 'kl_weight', [*NO_FINITE, -1]),
    ('online_dpo', 'kl_weight', [*NO_FINITE, 0, -1]),
    ('ipo', 'kl_weight', [*NO_FINITE, 0, -1]),
    ('on_policy_distillation', 'num_policy', NO_COUNT),
  ],
)
def test_arguments_that_no_algorithm_could_work_with(algorithm, name, bad):
  for value in bad:
    config = demo.get_config(f'algorithm={algorithm}')
    assert name in config.algorithm.args
    change(config, f'algorithm.args.{name}', value)
    with pytest.raises(UserError) as e:
      setups.make_algorithm(config)
    assert '\n' not in str(e.value)
    assert name in str(e.value) or algorithm in str(e.value)


def test_every_argument_of_every_algorithm_is_tried():
  mark = next(
    m for m in test_arguments_that_no_algorithm_could_work_with.pytestmark
  )
  tried = {case[:2] for case in mark.args[1]}
  assert tried == {
    (algorithm, name)
    for algorithm, (*_, args) in demo.ALGORITHMS.items()
    for name in args
  }
