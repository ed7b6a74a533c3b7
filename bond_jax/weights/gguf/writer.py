"""Models as GGUF files, for llama.cpp, Ollama and what else reads them.

The folder appears under its name when the file in it is complete. Tensors are
written as they come: the host holds one at a time.
"""

from collections.abc import Iterator
import math
import os

import numpy as np
from sentencepiece import sentencepiece_model_pb2

from bond_jax.data import gguf as gguf_file
from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Params
from bond_jax.weights.gguf import layout
from bond_jax.weights.huggingface import config_json, writer
from bond_jax.weights.huggingface import layout as hf_layout

FILE = 'model.gguf'
KINDS = {'float32': 'F32', 'float16': 'F16', 'bfloat16': 'BF16', 'q8_0': 'Q8_0'}


def export(
  params: Params,
  config: gemma.Config,
  path: str,
  *,
  dtype: str,
  tokenizer_path: str,
  lora: Params | None = None,
  temperature: float = 1.0,
) -> None:
  """Writes a model and its vocabulary as one file in a folder.

  Args:
    params: the tree of models/gemma, arrays on any devices of this process.
    config: its sizes; rows of the embedding that no token uses are left out.
    path: the folder to make.
    dtype: of the matrices, one of KINDS; the scales of norms stay in float32,
      and rows that no whole number of blocks fills in float16.
    tokenizer_path: a SentencePiece model.
    lora: adapters to merge, in float32 and rounded once.
    temperature: of the policy.
  """
  gguf = layout.library()
  raw = config_json.to_json(config, 'float32')
  families = {v: k for k, v in layout.FAMILIES.items()}
  architecture = families[raw['model_type']]
  _check(config, raw, architecture)
  names = layout.tensor_names(config, architecture)
  shapes = hf_layout.tensors(config, config_json.vocab_rows(config))
  kinds = {k: _kind(shape, dtype) for k, shape in shapes.items()}
  tokens = tokenizer_lib.load(tokenizer_path)
  size = sum(
    math.prod(gguf.quant_shape_to_byte_shape(shapes[k], kind))
    for k, kind in kinds.items()
  )
  with writer.new_folder(path, size) as folder:
    out = gguf.GGUFWriter(os.path.join(folder, FILE), architecture)
    _add_settings(out, config, raw, architecture)
    _add_vocabulary(out, tokens, tokenizer_path, raw['model_type'])
    out.add_file_type(gguf.LlamaFileType[_file_type(dtype)])
    out.add_sampling_temp(temperature)
    # Readers cut the tail off unless told not to.
    out.add_sampling_top_k(0)
    out.add_sampling_top_p(1.0)
    out.add_sampling_min_p(0.0)
    for name, kind in kinds.items():
      shape = gguf.quant_shape_to_byte_shape(shapes[name], kind)
      out.add_tensor_info(
        names[name], shape, np.dtype('u1'), math.prod(shape), kind
      )
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_ti_data_to_file()
    order = iter(kinds)
    for name, x in _tensors(config, params, lora or {}):
      assert name == next(order), name
      out.write_tensor_data(gguf.quants.quantize(x, kinds[name]))
    out.close()


def _check(config: gemma.Config, raw, architecture: str) -> None:
  """Refuses what llama.cpp would compute in another way."""
  scalar = layout.query_scalar(
    config.layers, config.features, config.heads, config.head_size
  )
  period = len(config.pattern)
  whole = ('local',) * (period - 1) + ('global',)
  two = architecture == 'gemma2'  # which has a window and caps always
  wrong = {
    'query_scale': raw.get('query_pre_attn_scalar', scalar) != scalar,
    'pattern': config.pattern != whole or (two and period == 1),
    'attention_softcap': two and not config.attention_softcap,
    'final_softcap': bool(config.final_softcap) != two,
  }
  for name, bad in wrong.items():
    if bad:
      raise UserError(
        f'GGUF has no key for {name} {getattr(config, name)!r} of a model of'
        f' {config.layers} layers: llama.cpp would compute another model;'
        ' export with --format=hf.'
      )


def _kind(shape: tuple[int, ...], dtype: str):
  """The quantisation of a tensor."""
  gguf = layout.library()
  kinds = gguf.GGMLQuantizationType
  if len(shape) == 1:
    return kinds.F32
  kind = kinds[KINDS[dtype]]
  whole = shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
  return kind if whole else kinds.F16


def _file_type(dtype: str) -> str:
  return 'ALL_F32' if dtype == 'float32' else f'MOSTLY_{KINDS[dtype]}'


def _add_settings(out, config: gemma.Config, raw, architecture: str) -> None:
  gguf = layout.library()
  out.add_name(config_json.known_as(config) or architecture)
  out.add_context_length(raw['max_position_embeddings'])
  out.add_embedding_length(config.features)
  out.add_block_count(config.layers)
  out.add_feed_forward_length(config.feed_forward)
  out.add_head_count(config.heads)
  out.add_head_count_kv(config.kv_heads)
  out.add_key_length(config.head_size)
  out.add_value_length(config.head_size)
  out.add_layer_norm_rms_eps(raw['rms_norm_eps'])
  out.add_rope_freq_base(config.global_rope_base)
  if architecture != 'gemma' and 'local' in config.pattern:
    out.add_sliding_window(config.window)
    out.add_sliding_window_pattern(len(config.pattern))
    out.add_rope_freq_base_swa(config.local_rope_base)
  if config.global_rope_scale != 1:
    out.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    out.add_rope_scaling_factor(config.global_rope_scale)
  if config.attention_softcap:
    out.add_attn_logit_softcapping(config.attention_softcap)
  if config.final_softcap:
    out.add_final_logit_softcapping(config.final_softcap)


def _add_vocabulary(
  out, tokenizer: tokenizer_lib.Tokenizer, path: str, model_type: str
) -> None:
  content = tokenizer_lib.content_of(path)
  model = sentencepiece_model_pb2.ModelProto.FromString(content)
  pieces, kinds = zip(
    *(gguf_file.to_gguf(x.piece, x.type) for x in model.pieces), strict=True
  )
  out.add_tokenizer_model('llama')
  out.add_tokenizer_pre('default')
  out.add_token_list(pieces)
  out.add_token_scores([x.score for x in model.pieces])
  out.add_token_types(kinds)
  out.add_pad_token_id(tokenizer.pad_id)
  out.add_eos_token_id(tokenizer.eos_id)
  out.add_bos_token_id(tokenizer.bos_id)
  out.add_unk_token_id(tokenizer.unk_id)
  out.add_add_bos_token(True)
  out.add_add_eos_token(False)
  out.add_add_space_prefix(model.normalizer_spec.add_dummy_prefix)
  if tokenizer.end_of_turn is not None:
    out.add_eot_token_id(tokenizer.end_of_turn)
    described = writer.describe_tokenizer(tokenizer, model_type)
    out.add_chat_template(described['chat_template'])


def _tensors(
  config: gemma.Config, params: Params, adapters: Params
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name in Hugging Face, float32 numbers as GGUF has them)."""
  for name, x in writer.merged(config, params, adapters):
    x = np.asarray(x, np.float32)
    if name == 'embedder/input_embedding':
      x = x[: config_json.vocab_rows(config)]
    for part, copy in writer.copies_of(hf_layout.parts(config, name), x):
      norm = layout.is_norm(part.tensor)
      yield part.tensor, np.ascontiguousarray(copy + 1 if norm else copy)
