"""`gm.text.Sampler` of the gemma library, its lengths cut to the workload.

Its defaults, a cache of 4,096 and an output of 2,048 tokens, are 7 to 14 times
slower here.
"""

import dataclasses
import enum
import functools
import os

from gemma import gm
from gemma.gm.nn import _config, _modules
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workloads
from benchmarks.workers import serve


class _Special(gm.text.SpecialTokens, enum.IntEnum):
  """None of them can be drawn: what stops is given to the sampler."""

  PAD = 0
  EOS = -1
  BOS = -2
  UNK = -3
  CUSTOM = -4
  END_OF_TURN = -5
  BEGIN_OF_TOOL_RESPONSE = -6


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Numbers(gm.text.Tokenizer):
  """Reads ids written in figures; text is not measured, and none is made."""

  path: str = ''
  special_tokens = _Special

  def encode(self, text, *, add_bos=False, add_eos=False):
    return workloads.ids(text)

  def decode(self, ids):
    return ''


def make_model():
  """The sizes of bond_jax's gemma3_tiny."""
  kinds = _modules.AttentionType
  config = _config.TransformerConfig(
    num_embed=workloads.VOCAB,
    embed_dim=128,
    hidden_dim=640,
    num_heads=4,
    head_dim=32,
    num_kv_heads=2,
    final_logit_softcap=None,
    attn_logits_soft_cap=None,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(
      kinds.LOCAL_SLIDING,
      kinds.GLOBAL,
      kinds.LOCAL_SLIDING,
    ),
    query_pre_attn_norm=(
      _config.QueryPreAttentionNormalisation.BY_ONE_OVER_SQRT_HEAD_DIM
    ),
    sliding_window_size=16,
    transpose_gating_einsum=True,
    use_qk_norm=True,
    local_base_frequency=10_000,
    global_base_frequency=1_000_000,
  )
  return gm.nn.Transformer(config=config, dtype=jnp.float32)


def read_params(folder: str):
  """The nested tree of the library."""
  tree = {}
  with np.load(os.path.join(folder, 'weights.npz')) as arrays:
    for name in arrays.files:
      node = tree
      *path, leaf = name.split('/')
      for part in path:
        node = node.setdefault(part, {})
      node[leaf] = jnp.asarray(arrays[name])
  return tree


def sampler(model, params) -> serve.Call:
  @functools.cache
  def prepared(workload):
    sampler = gm.text.Sampler(
      model=model,
      params=params,
      tokenizer=_Numbers(),
      sampling=gm.text.RandomSampling(temperature=1.0),
      stop_tokens=workloads.stop_ids(workload),
      cache_length=workload.prompt_length + workload.new_tokens,
      max_out_length=workload.new_tokens,
      pad_length=workload.prompt_length,
    )
    rows = np.repeat(workloads.tokens(workload), workload.n, 0)
    parts = workloads.batches(workload, rows)
    return sampler, [[workloads.text(row) for row in x] for x in parts]

  def call(workload, seed):
    sampler, parts = prepared(workload)
    found = []
    for texts, seed_ in zip(
      parts, workloads.seeds(seed, len(parts)), strict=True
    ):
      out = sampler.sample(texts, rng=seed_, return_state=True)
      tokens = np.asarray(out.state.predicted_tokens)
      found += workloads.lengths(tokens, workloads.stop_ids(workload))
    return found

  return call


def open_(folder: str):
  hello = dict(
    versions=serve.versions('gemma', 'jax'), device=jax.devices()[0].device_kind
  )
  return dict(sample=sampler(make_model(), read_params(folder))), hello


if __name__ == '__main__':
  serve.serve(open_)
