"""What is sampled: the same prompts, lengths and stops for every sampler.

Imports numpy alone: the other libraries' environments read it too.
"""

from typing import NamedTuple

import numpy as np

VOCAB = 1024
# Of nearly uniform logits, 16 of 1,024 ids end a completion with 1/64 a token.
STOP_IDS = tuple(range(16, 32))
# The final norm's 1 + scale: what makes random weights' logits nearly uniform.
LOGIT_SCALE = 0.02


class Workload(NamedTuple):
  """One call of a sampler, or several that give as many completions."""

  name: str
  prompts: int
  n: int  # completions of each
  prompt_length: int
  new_tokens: int  # at most, where `stop`
  stop: bool = False  # STOP_IDS end a completion
  slots: int = 0  # rows decoded side by side; 0 = all


FIXED = tuple(Workload(f'batch {b}', b, 1, 32, 64) for b in (1, 8, 32, 128))
GROUPS = tuple(
  Workload(f'batch {b}, n = 8', b, 8, 32, 64) for b in (1, 8, 32, 128)
)
SHARED = (
  Workload('8 prompts x 16', 8, 16, 256, 32),
  Workload('8 prompts x 8', 8, 8, 256, 64),
)
MIX = Workload('length mix', 512, 1, 32, 256, stop=True, slots=32)
# Of released weights.
REAL = (
  *(Workload(f'batch {b}', b, 1, 32, 32) for b in (1, 8, 32)),
  Workload('8 prompts x 8', 8, 8, 128, 32),
)
# J-BOND's three completions of each prompt, GRPO's group of three.
STEP = Workload('step', 8, 3, 32, 64)
REAL_STEP = Workload('step', 8, 3, 16, 16)


def tokens(workload: Workload, vocab: int = VOCAB) -> np.ndarray:
  """The prompts, i32[prompts, length]: no padding, no stop, no control id."""
  rng = np.random.default_rng(0)
  shape = workload.prompts, workload.prompt_length
  return rng.integers(max(STOP_IDS) + 1, vocab, shape).astype(np.int32)


def stop_ids(workload: Workload) -> tuple[int, ...]:
  return STOP_IDS if workload.stop else ()


def batches(workload: Workload, rows: np.ndarray) -> list[np.ndarray]:
  """The prompts as a sampler without a queue gets them: `slots` at a time."""
  size = workload.slots or len(rows)
  return [rows[i : i + size] for i in range(0, len(rows), size)]


def seeds(seed: int, parts: int) -> list[int]:
  """One for each batch: of nearly uniform logits the same draw the same."""
  return [100 * seed + i for i in range(parts)]


def text(row: np.ndarray) -> str:
  """A prompt for samplers that want text: its ids, as `ids` reads them."""
  return ' '.join(map(str, row))


def ids(text: str) -> list[int]:
  return [int(x) for x in text.split()]


def lengths(rows: np.ndarray, stops: tuple[int, ...]) -> list[int]:
  """Tokens of each row i32[R, T] up to and including its first stop id."""
  ends = np.isin(rows, stops)
  first = np.where(ends.any(1), ends.argmax(1), rows.shape[1] - 1)
  return (first + 1).tolist()
