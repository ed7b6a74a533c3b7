"""The sizes and switches of every Gemma text model, under its public name."""

import dataclasses

# The axes of a layer's weights, and those that a product sums over. C counts
# the matrices in one array; of the other letters see layers.py.
_AXES = {
  'attn/q_einsum/w': ('NDH', 'D'),
  'attn/kv_einsum/w': ('CKDH', 'D'),
  'attn/qkv_einsum/w': ('CNDH', 'D'),
  'attn/attn_vec_einsum/w': ('NHD', 'NH'),
  'mlp/gating_einsum': ('CDF', 'D'),
  'mlp/linear': ('FD', 'F'),
}
WEIGHTS = tuple(_AXES)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes and switches of one Gemma model."""

  vocab_size: int  # rows of the embedding
  features: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  feed_forward: int
  pattern: tuple[str, ...] = ('global',)  # 'local' or 'global'
  window: int = 0  # positions a local layer sees, itself included
  qk_norm: bool = False
  post_norms: bool = False
  query_scale: float | None = None  # default head_size ** -0.5
  attention_softcap: float | None = None
  final_softcap: float | None = None
  local_rope_base: float = 10_000.0
  global_rope_base: float = 10_000.0
  global_rope_scale: float = 1.0
  gating_transposed: bool = False  # official [2, F, D] instead of [2, D, F]
  used_vocab: int | None = None  # tokens the tokenizer knows; the rest masked
  lora_scale: float | None = None  # alpha / rank, where trees have adapters


def kinds(config: Config) -> list[str]:
  """'local' or 'global' of every layer, bottom up."""
  size = len(config.pattern)
  return [config.pattern[j % size] for j in range(config.layers)]


def in_patterns(config: Config) -> int:
  """Layers in whole patterns; the rest are above them."""
  return config.layers - config.layers % len(config.pattern)


def axes(config: Config, name: str) -> tuple[str, str]:
  """The axes of a layer's weight, one of WEIGHTS, and those summed over."""
  found, inputs = _AXES[name]
  if name == 'mlp/gating_einsum' and config.gating_transposed:
    found = 'CFD'
  return found, inputs


def _gemma1(**kwargs) -> Config:
  return Config(vocab_size=256_128, used_vocab=256_000, head_size=256, **kwargs)


def _gemma2(**kwargs) -> Config:
  return Config(
    vocab_size=256_128,
    used_vocab=256_000,
    pattern=('local', 'global'),
    window=4096,
    post_norms=True,
    attention_softcap=50.0,
    final_softcap=30.0,
    **kwargs,
  )


def _gemma3(**kwargs) -> Config:
  return Config(
    **{
      **dict(
        pattern=('local',) * 5 + ('global',),
        qk_norm=True,
        post_norms=True,
        global_rope_base=1_000_000.0,
        gating_transposed=True,
        vocab_size=262_144,
      ),
      **kwargs,
    }
  )


# The 27B models scale queries by features per head, not by the head's size.
CONFIGS = {
    'gemma_2b': _gemma1(
        features=2048, layers=18, heads=8, kv_heads=1, feed_forward=16_384,
    ),
    'gemma_7b': _gemma1(
        features=3072, layers=28, heads=16, kv_heads=16, feed_forward=24_576,
    ),
    'gemma2_2b': _gemma2(
        features=2304, layers=26, heads=8, kv_heads=4, head_size=256,
        feed_forward=9216,
    ),
    'gemma2_9b': _gemma2(
        features=3584, layers=42, heads=16, kv_heads=8, head_size=256,
        feed_forward=14_336, gating_transposed=True,
    ),
    'gemma2_27b': _gemma2(
        features=4608, layers=46, heads=32, kv_heads=16, head_size=128,
        feed_forward=36_864, gating_transposed=True,
        query_scale=(4608 / 32) ** -0.5,
    ),
    # The demo's: 1.02M parameters, everything of Gemma 3 but the size.
    'gemma3_tiny': _gemma3(
        vocab_size=1024, features=128, layers=3, heads=4, kv_heads=2,
        head_size=32, feed_forward=640, pattern=('local', 'global'), window=16,
    ),
    'gemma3_270m': _gemma3(
        features=640, layers=18, heads=4, kv_heads=1, head_size=256,
        feed_forward=2048, window=512,
    ),
    'gemma3_1b': _gemma3(
        features=1152, layers=26, heads=4, kv_heads=1, head_size=256,
        feed_forward=6912, window=512,
    ),
    'gemma3_4b': _gemma3(
        features=2560, layers=34, heads=8, kv_heads=4, head_size=256,
        feed_forward=10_240, window=1024, global_rope_scale=8.0,
    ),
    'gemma3_12b': _gemma3(
        features=3840, layers=48, heads=16, kv_heads=8, head_size=256,
        feed_forward=15_360, window=1024, global_rope_scale=8.0,
    ),
    'gemma3_27b': _gemma3(
        features=5376, layers=62, heads=32, kv_heads=16, head_size=128,
        feed_forward=21_504, window=1024, global_rope_scale=8.0,
        query_scale=(5376 / 32) ** -0.5,
    ),
}  # fmt: skip
