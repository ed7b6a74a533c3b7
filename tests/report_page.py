"""A run as its report gets it, with completions that try to take the page."""

import numpy as np

from bond_jax.evaluation.report import page
from bond_jax.measures import aggregate, curves

# Each would set `window.taken`, or fetch, if it got out of the text.
ATTACKS = (
  '<script>window.taken = 1</script>',
  '<img src=x onerror="window.taken = 2">',
  '"><svg onload="window.taken = 3">',
  "' onmouseover='window.taken = 4' autofocus onfocus='window.taken = 5",
  '</p></div></main></script><script>window.taken = 6</script>',
  '<style>main { display: none }</style>',
  '<iframe srcdoc="<script>parent.taken = 7</script>"></iframe>',
  '<a href="javascript:window.taken = 8">here</a>',
  '<base href="file:///"><link rel=stylesheet href=a.css>',
  '{title} {0} %s $& \\1 \u202e\u2066 \ud800 \x00 &amp;amp; --> ]]>',
)
SETTINGS = {
  'seed': 7,
  'gold': {'function': 'my.judges:kindness'},
  'train': {'note': ATTACKS[0], 'rates': (0.3, 1.0)},
}
SFT = [{'step': s, 'loss': 5 / s, 'validation_loss': 6 / s} for s in (1, 2, 3)]


def records():
  """24 prompts, 8 completions a side; the first ones carry the attacks."""
  rng = np.random.default_rng(0)
  rows = []
  for x in range(24):
    for who, shift in (('reference', 0.0), ('policy', 1.5)):
      for a in range(8):
        attack = ATTACKS[x % len(ATTACKS)]
        rows.append(
          {
            'id': x,
            'prompt': f'Opening {x} {attack}',
            'completion': f' {who} {a} {attack}',
            'reward': float(rng.normal() + shift),
            'gold': float(rng.normal() + shift),
            'log_policy': -20.0 + shift,
            'log_reference': -20.0,
            'who': who,
            'length': 9,
            'truncated': False,
          }
        )
  return rows


def train_rows():
  rows = []
  for step in range(1, 61):
    row = {
      'step': step,
      'reward/policy': step / 60,
      'reward/anchor': step / 90,
      'kl/policy_anchor': 0.1,
      'anchor/drift': step / 1000,
      'signal/fires': 0.3,
      'length/completion': 12.0,
      'loss': 0.1,
      'sampler_gap': 1e-6,
      'seconds/sample': 0.2,
      'seconds/reward': 0.01,
      'seconds/update': 0.7,
    }
    if step % 20 == 0:
      row |= {
        'kl/reference': step / 40,
        'win_rate/reference': 0.5 + step / 200,
        'seconds/evaluate': 3.0,
      }
    rows.append(row)
  return rows


# What stages add to `measures.summarise`, and what tests want to know of it.
MORE = {
  'win_rate_against_best_of': {
    '16': {'win_rate': 0.21, 'interval': [0.18, 0.24]},
    '2': {'win_rate': 0.68, 'interval': [0.66, 0.71]},
    '4': {'win_rate': 0.52, 'interval': [0.49, 0.55]},
    '8': {'win_rate': 0.36, 'interval': [0.33, 0.39]},
  },
  'quantiles': {
    'edges': [0.0, 0.25, 0.5, 0.75, 1.0],
    'policy': [0.1, 0.3, 0.6, 3.0],
    'best_of_n': [0.02, 0.23, 1.0, 2.75],
    'n': 4.5,
  },
  'effective_n_interval': [4.1, 4.9],
  'frontier_efficiency_interval': [0.41, 0.47],
  'length_controlled_win_rate': 0.8,
  'length_controlled_win_rate_interval': [0.78, 0.82],
  'length_controlled_reason': None,
  'entropy_policy': 19.0,
  'entropy_reference': 20.0,
  'distinct_completions_policy': 1.0,
  'distinct_completions_reference': 1.0,
  'tokens_per_second': 1234.0,
  'throughput_reason': None,
  'against': 'reference',
  'checkpoint': 'last',
  'steps': 60,
  'seconds': 75.0,
  'anchor_drift': 0.06,
  'signal_fires': 0.3,
  'compilations_after_first_step': 0,
}


def write(folder, **changes) -> str:
  """Writes the page of this run, its summary changed; returns the path."""
  rows = records()
  return page.write_report(
    str(folder),
    settings=SETTINGS,
    train=train_rows(),
    sft=SFT,
    summary=aggregate.summarise(rows) | MORE | changes,
    curve=curves.best_of_n_curve(aggregate.grid(rows, 'reference')['reward']),
    samples=page.side_by_side(rows),
  )


def read(path) -> str:
  with open(path, encoding='utf-8') as f:
    return f.read()
