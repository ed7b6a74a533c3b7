"""How a GGUF file names the settings and tensors of Hugging Face's Gemma."""

from bond_jax.errors import UserError
from bond_jax.models.gemma import model as gemma
from bond_jax.weights.huggingface import layout

# general.architecture -> model_type.
FAMILIES = {'gemma': 'gemma', 'gemma2': 'gemma2', 'gemma3': 'gemma3_text'}
# Of every so many layers the last is a full one, unless a file says otherwise.
PERIODS = {'gemma2': 2, 'gemma3': 6}

# Key after the architecture -> that of config.json.
SETTINGS = {
  'embedding_length': 'hidden_size',
  'block_count': 'num_hidden_layers',
  'feed_forward_length': 'intermediate_size',
  'attention.head_count': 'num_attention_heads',
  'attention.head_count_kv': 'num_key_value_heads',
  'attention.key_length': 'head_dim',
  'attention.layer_norm_rms_epsilon': 'rms_norm_eps',
  'attention.sliding_window': 'sliding_window',
  'rope.freq_base': 'rope_theta',
  'rope.freq_base_swa': 'rope_local_base_freq',
  'attn_logit_softcapping': 'attn_logit_softcapping',
  'final_logit_softcapping': 'final_logit_softcapping',
}
# With so many layers, of the 27B models, llama.cpp scales queries by features
# per head; no key says so.
_LARGEST = 46, 62


def library():
  """The gguf package; a UserError where it is not installed."""
  try:
    import gguf
  except ModuleNotFoundError as e:
    raise UserError(
      'GGUF files need the package gguf: pip install gguf==0.19.0.'
    ) from e
  return gguf


def tensor_names(config: gemma.Config, architecture: str) -> dict[str, str]:
  """Name of a tensor in Hugging Face, without its prefix -> that in GGUF."""
  gguf = library()
  names = gguf.get_tensor_name_map(
    gguf.MODEL_ARCH[architecture.upper()], config.layers
  )
  stems = [x.removesuffix('.weight') for x in layout.tensors(config, 1)]
  return {
    f'{x}.weight': f'{names.get_name(f"model.{x}")}.weight' for x in stems
  }


def is_norm(tensor: str) -> bool:
  """Whether a tensor is a norm's scale: one more in GGUF than elsewhere."""
  return tensor.endswith('norm.weight')


def query_scalar(layers: int, features: int, heads: int, head: int) -> int:
  """What llama.cpp divides queries by the root of."""
  return features // heads if layers in _LARGEST else head
