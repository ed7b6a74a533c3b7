r"""The demo: J-BOND of a tiny Gemma 3 on movie-review sentences.

    make demo

Another algorithm on the same task is another argument,
`--config=configs/demo.py:algorithm=rloo`. Hardware: any laptop; two CPU cores
take about five minutes. A real run differs in sizes alone.
"""

import ml_collections

# Steps, batch, learning rate and arguments of each. All draw 92,160
# completions: steps x batch x completions per prompt.
ALGORITHMS = dict(
  jbond=(240, 128, 5e-4, dict(
    num_anchor=2, backward_weight=0.5, anchor_rate=0.022, drift_weight=0.0,
  )),
  bond=(160, 64, 5e-4, dict(
    n=4, backward_weight=0.5, drift_weight=0.0, num_policy=1,
    quantile='monte_carlo', num_quantile=8, zero='half', second_term=False,
    anchor='fixed',
  )),
  best_of_n=(180, 128, 5e-4, dict(n=4, anchor='fixed')),
  vbon=(160, 64, 5e-4, dict(n=4, num_quantile=8)),
  bonbon=(180, 128, 5e-4, dict(n=4, sft_weight=0.005)),
  wind=(180, 128, 3e-4, dict(
    kl_weight=0.2, step_size=1.0, risk='squared', constant='fitted',
    num_anchor=4, rows=4,
  )),
  sppo=(180, 128, 1e-4, dict(step_size=1.0, num_anchor=4, rows='extremes')),
  rloo=(360, 128, 3e-4, dict(num_policy=2, kl_weight=0.7)),
  reinforce=(720, 128, 3e-4, dict(kl_weight=0.7)),
  online_dpo=(360, 128, 1e-4, dict(kl_weight=1.0)),
  ipo=(360, 128, 3e-4, dict(kl_weight=0.2)),
)  # fmt: skip


def adam(learning_rate, *, warmup_steps, decay_to):
  """The settings of an optimizer; decay_to is the share of the rate left."""
  return dict(
    learning_rate=learning_rate,
    warmup_steps=warmup_steps,
    decay_to=decay_to,
    b1=0.9,
    b2=0.99,
    epsilon=1e-8,
    weight_decay=0.0,
    clip=1.0,  # global norm
  )


def watch():
  """When training warns of what goes wrong slowly; see docs/config.md."""
  return dict(
    kl=10.0,  # nats to the reference
    entropy=0.5,  # per token, less than this share of what it was at first
    length=2.0,  # times as long, or as short, as at first
    signal=0.05,  # share of prompts with a signal
    speed=2.0,  # times the seconds of a step at first
    stop=(),  # at which of these it ends: ('kl', 'entropy')
  )


def reward(function, /, **args):
  """A reward, or a judge of pairs, and how it is called."""
  return dict(
    function=function,  # module:function, which makes it
    args=args,
    # Several in the place of one, name -> dict(function, args, weight).
    parts=dict(),
    missing_eos_penalty=0.0,  # taken off completions that were cut
    length_penalty=0.0,  # taken off per token
    failure='stop',  # or 'skip': go on without the prompts on which it fails
    retries=0,  # attempts after one that failed
    timeout=0.0,  # seconds for a batch; 0 = as long as it takes
    # Of a judge: the reference's completions that evaluation compares with.
    opponents=0,
  )


def get_config(argument: str = 'algorithm=jbond') -> ml_collections.ConfigDict:
  """Returns the settings of all four stages, for one algorithm."""
  _, _, name = argument.partition('algorithm=')
  # A name that is not here is refused, with those that are, by every stage.
  steps, batch, rate, args = ALGORITHMS.get(name, (1, 8, 1e-3, {}))
  config = ml_collections.ConfigDict()
  config.seed = 0
  # The run whose sft and reward stages this one starts from: by default its
  # own. Give a finished run's folder to compare algorithms on one reference.
  config.reference = '{workdir}'
  # A save that fails: 'stop', or 'go_on' and try again at the next.
  config.save_failure = 'stop'
  config.task = 'text'  # the module that says what is trained on
  # Devices along each axis; data=-1 takes all.
  config.mesh = dict(data=-1, model=1)
  config.sampling_mesh = dict(data=-1, model=1)  # the same devices
  # A TFDS builder, a path with {split} that ends in .jsonl, .json, .jsonl.gz or
  # .parquet, or hf:owner/name@commit; see docs/data.md for this and the rest.
  config.data = dict(
    name='movie_reviews',
    data_dir='data',  # of TFDS
    fields=dict(),  # our names of fields -> theirs: text='document'
    splits=dict(),  # our splits -> theirs: validation='train[:5%]'
    # Several in the place of one, name -> dict(name, weight, fields, splits).
    mix=dict(),
    bad_rows='stop',  # or 'skip': leave them out, and say how many
  )
  config.weights = ''  # a checkpoint that the sft stage starts from; '' = none
  # A SentencePiece file; '' = one that the sft stage trains on the data.
  config.tokenizer = dict(path='', sha256='', vocab_size=1024)
  config.model = dict(
    name='gemma3_tiny',  # see models/gemma.py:CONFIGS
    sizes=dict(),  # of models/gemma.py:Config, instead of those of the name
    temperature=1.0,  # of sampling and of scoring alike
    dtype='float32',  # of the computation; parameters are float32 always
    scan=False,  # loop over layers: compiles faster, runs slower on CPU
    remat='none',  # of layers, in the backward pass: 'products', 'all'
    # Adapters instead of all weights; rank 0 = all weights. targets: a regular
    # expression, found in names such as attn/q_einsum/w and mlp/linear.
    lora=dict(
      rank=0,
      alpha=16.0,
      targets='attn|mlp',
      # A peft adapter that training starts from; '' = one that changes nothing.
      weights='',
      exact_anchor=False,  # average the products of the adapters, not these
    ),
  )
  # BOS and the first four pieces of a sentence; see data.encoder.
  config.prompt = dict(
    kind='opening',
    length=5,
    longer='drop',  # or 'cut': of longer texts and turns keep BOS and the end
  )
  config.length = 24  # new tokens at most
  # Texts that end a completion, as EOS does: it ends with the first token after
  # which it contains one of them, and that token is part of it.
  config.stop = ()
  config.chunk = 8192  # tokens whose logits exist at one time, on each device
  # Completions decoded side by side; one that ends makes room for the next.
  config.slots = 0  # 0 = all of a batch at once

  config.sft = dict(
    steps=320,
    batch=64,
    # 'text': whole sentences; 'completion': that field, after the prompt.
    target='text',
    length=48,  # pieces of a sentence, EOS included; longer ones are cut
    optimizer=adam(2e-2, warmup_steps=30, decay_to=0.0),
    save_every=80,
    validation_batches=4,
  )

  config.reward_model = dict(
    kind='ridge',  # or 'gemma'; see configs/demo_learned_reward.py
    order=3,  # pieces of the longest n-grams
    min_count=2,  # texts that an n-gram must be in
    alphas=(0.25, 0.5, 1.0, 2.0),  # ridge penalties to choose from
  )
  config.reward = reward(
    'bond_jax.rewards.ridge:ridge', path='{reference}/reward/model.npz'
  )
  # A reward that nothing is trained on.
  config.gold = dict(function='bond_jax.rewards.text:vader', args=dict())

  config.algorithm = dict(
    name=name,  # a file in bond_jax/algorithms; unknown ones are refused
    args=args,
  )
  config.train = dict(
    steps=steps,
    # Prompts per step. Noise is what limits J-BOND here: 16 times as many pay
    # 0.78 instead of 1.02 nats for a win rate of 0.8 (docs/benchmarks.md).
    batch=batch,
    rollouts=1,  # batches drawn before an iteration's updates
    epochs=1,  # updates on each of them, before the anchor moves
    micro_batches=1,
    # Lengths to which micro-batches are padded: j / buckets of both lengths.
    buckets=1,
    optimizer=adam(rate, warmup_steps=20, decay_to=0.1),
    save_every=20,
    skip_limit=0,  # steps in a row that may not be finite, and change nothing
    watch=watch(),
    probe_prompts=128,  # validation openings that the curves are made of
    probe_completions=4,
  )
  config.evaluate = dict(
    prompts=256,  # openings of the test split
    policy_completions=32,  # of each
    reference_completions=64,  # of each; the Best-of-N curve needs them
    at_once=8,  # completions of each prompt in one call
    samples_shown=20,
  )
  return config
