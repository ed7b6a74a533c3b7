r"""Faster WIND's comparison: WIND, SPPO and J-BOND against a judge of pairs.

    launch/tpu_vm.sh train \
      --config=configs/ultrafeedback_wind.py:algorithm=wind \
      --workdir=runs/wind --config.weights=... --config.tokenizer.path=... \
      --config.data.name=hf:HuggingFaceH4/ultrafeedback_binarized@COMMIT \
      --config.reward.args.path=... --config.gold.function=...

The paper (arXiv 2410.20727, section 5) starts from Llama 3 8B Instruct, takes
the prompts of UltraFeedback and the judge PairRM, and runs three iterations of
some 20,000 prompts each, as SPPO's public code does, whose learning rate, step
size and five completions are taken here for SPPO. The authors' checkpoints
(huggingface.co/jcmei, llama-3-8b-instruct-{windo,sppo,jbond}-iter{1,2,3}) say:
learning rate 5e-7, batch 64, one epoch an iteration, a linear schedule with a
warm-up of 0.1, and three iterations of J-BOND too. Each iteration is a run of
its own there: it begins with a new optimizer and schedule, as here. WIND's KL
weight, step size, completions per prompt and risk, and the optimizer were not
found. These are ours, as is all of J-BOND's against a judge, which sees how
often a completion beats the others.

WIND's kl_weight b and step_size e: after t iterations the reference has the
weight 1 - (1 + b e)^-t in the policy's logarithm, and the equilibrium, without
ties, has the win rate 1 / a - b and the KL 1 / (2 b) + log(a b), a =
1 - exp(-1 / b). With b = 0.2 and e = 5 that is a weight of 0.88 after three
iterations, a win rate of 0.81 and 0.88 nats, as Best-of-4.2 wins; exact steps
are 0.06 nats from it then. SPPO's e = 1000 with b = 1e-5 would be a weight of
0.03: SPPO, and no equilibrium within reach.

The model is Gemma 2 9B; reward.args.path is a classifier of pairs, a folder or
owner/name@commit. Hardware, estimated and not yet tried: 32 TPU v5e chips.
"""

from configs import gemma_jbond

BATCH, PROMPTS, ITERATIONS = 64, 20_000, 3
ROLLOUTS = PROMPTS // BATCH  # of an iteration
# Learning rate, rollouts per iteration, arguments.
ALGORITHMS = dict(
  wind=(5e-7, ROLLOUTS, dict(
    kl_weight=0.2, step_size=5.0, risk='squared', constant='fitted',
    num_anchor=2, rows=2,
  )),
  sppo=(5e-7, ROLLOUTS, dict(
    step_size=1000.0, num_anchor=5, rows='extremes',
  )),
  jbond=(3e-6, 1, dict(
    num_anchor=2, backward_weight=0.5, anchor_rate=0.02, drift_weight=0.0,
  )),
)  # fmt: skip


def get_config(argument: str = 'algorithm=wind'):
  _, _, name = argument.partition('algorithm=')
  rate, rollouts, args = ALGORITHMS.get(name, (1e-6, 1, {}))
  config = gemma_jbond.get_config(
    'gemma2_9b', vocab_size=256_000, learning_rate=rate, lora_rank=0
  )
  config.data.fields = dict(text='prompt')
  config.data.splits = dict(
    train='train_prefs[1000:]', validation='train_prefs[:1000]',
    test='test_prefs',
  )  # fmt: skip
  config.reward.update(
    function='bond_jax.rewards.hf:pair_judge',
    args=dict(path=gemma_jbond.unset(), length=2048),
    opponents=4,
  )
  config.algorithm = dict(name=name, args=args)
  config.train.update(
    batch=BATCH,
    rollouts=rollouts,
    steps=ITERATIONS * ROLLOUTS,
    save_every=ROLLOUTS,
    restart=rollouts > 1,
  )
  if rollouts > 1:
    config.train.optimizer.update(
      warmup_steps=rollouts // 10, decay='linear', decay_to=0.0
    )
  return config
