"""Released weights: Gemma 3 270M here, in transformers and in llama.cpp.

The weights are fetched into data/ unless they are there. Without a network, or
without ACCEPT_GEMMA_TERMS=yes, all of this is skipped.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

os.environ['HF_HUB_OFFLINE'] = '1'  # this process asks nobody

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bond_jax.data import tokenizer as tokenizer_lib
from bond_jax.devices import sharding
from bond_jax.errors import UserError
from bond_jax.models import log_probs
from bond_jax.models.gemma import configs
from bond_jax.models.gemma import model as gemma
from bond_jax.types import Prompts
from bond_jax.weights import gemma_270m, official, stacks
from bond_jax.weights.gguf import layout, writer
from bond_jax.weights.huggingface import layout as hf_layout

why = 'needs requirements-hf.txt'
torch = pytest.importorskip('torch', reason=why)
transformers = pytest.importorskip('transformers', reason=why)

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = configs.CONFIGS['gemma3_270m']
TEXTS = {
  'English': 'The film is a triumph of style over substance, and a bore.',
  'German': 'Größere Häuser übertönen den Straßenlärm nur mäßig.',
  'Japanese': '日本の首都は東京です。映画を見に行きましょう。',
  'code': 'def f(x: int) -> int:\n    return x ** 2  # squared\n',
  'emoji': 'so good 🙂👩‍👩‍👧 10/10 ‼️',
  'spaces': '  two  and   three    and\ttabs \t ',
  'newlines': 'a\n\nb\n\n\n\nc\r\nd',
  'marks': 'a<b>c</b><unused7><start_of_turn>user\nhi<end_of_turn>',
}
LONG = ' '.join(TEXTS.values()) * 12  # beyond the window of 512
NEW = 32


@pytest.fixture(scope='session')
def folder():
  accepted = os.environ.get('ACCEPT_GEMMA_TERMS') == 'yes'
  try:
    return gemma_270m.prepare(str(ROOT / 'data'), accepted=accepted)
  except UserError as e:
    pytest.skip(f'Gemma 3 270M is not there: {e}')


@pytest.fixture(scope='session')
def file(folder):
  return os.path.join(folder, gemma_270m.FILE)


def like():
  mesh = sharding.make_mesh(data=1, model=1)
  return sharding.tree_structs(stacks.init_shapes(CONFIG), mesh, 'float32')


@pytest.fixture(scope='session')
def params(folder):
  return official.load(folder, CONFIG, like())


@pytest.fixture(scope='session')
def model(folder):
  """Theirs, of the folder that was converted."""
  found = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  )
  return found.eval()


@functools.cache
def policy():
  return gemma.make(
    CONFIG, temperature=1.0, dtype='float32', scan=True, remat='none'
  )


@pytest.fixture(scope='session')
def tokenizer(file):
  return tokenizer_lib.load(file)


def ids_of(tokenizer, text):
  return [tokenizer.bos_id, *tokenizer.encode(text)]


def theirs(model, tokens):
  with torch.no_grad():
    return model(torch.tensor([tokens])).logits[0].float().numpy()


@functools.cache
def _forward(length):
  @jax.jit
  def forward(params, tokens):
    hidden = policy().hidden(params, tokens, tokens >= 0)
    return policy().logits(params, hidden)[0]

  return forward


def ours(params, tokens):
  """Logits; to the right is what none of them sees."""
  length = len(tokens) + -len(tokens) % 64
  row = np.zeros((1, length), np.int32)
  row[0, : len(tokens)] = tokens
  return np.asarray(_forward(length)(params, row))[: len(tokens)]


# -- The file


def test_arrays_of_the_file(file, folder, model):
  """As transformers dequantises them, and as the folder has them."""
  other = transformers.AutoModelForCausalLM.from_pretrained(
    str(folder), gguf_file=gemma_270m.FILE, dtype=torch.float32
  )
  loaded = dict(stacks.nested(CONFIG, official.load(file, CONFIG, like())))
  state, folders = other.state_dict(), model.state_dict()
  seen = 0
  for name, x in loaded.items():
    parts = hf_layout.parts(CONFIG, name)
    copies = x if x.ndim > len(parts[0].axes) else x[None]
    for part, copy in zip(parts, np.asarray(copies), strict=True):
      wanted = state[f'model.{part.tensor}'].numpy()
      found = hf_layout.to_hf(part, copy)
      np.testing.assert_array_equal(found, wanted, part.tensor)
      same = folders[f'model.{part.tensor}'].numpy()
      np.testing.assert_array_equal(found, same, part.tensor)
      seen += 1
  assert seen == len(layout.tensor_names(CONFIG, 'gemma3')) == 236


def test_ids_of_texts(tokenizer, folder):
  theirs_of_file = transformers.AutoTokenizer.from_pretrained(
    folder, gguf_file=gemma_270m.FILE
  )
  theirs_of_folder = transformers.AutoTokenizer.from_pretrained(folder)
  for name, text in TEXTS.items():
    found = ids_of(tokenizer, text)
    assert theirs_of_folder(text).input_ids == found, name
    assert theirs_of_file(text).input_ids == found, name
    if name != 'marks':
      assert tokenizer.decode(found) == text


# -- The model


@pytest.mark.parametrize('name', [*TEXTS, 'long'])
def test_logits(name, params, model, tokenizer):
  tokens = ids_of(tokenizer, TEXTS.get(name, LONG))
  assert (len(tokens) > 2 * CONFIG.window) == (name == 'long')
  wanted = theirs(model, tokens)
  found = ours(params, tokens)
  # Rounding adds up over a thousand positions.
  error = (2e-5 if name == 'long' else 1e-5) * np.abs(wanted).max()
  np.testing.assert_allclose(found, wanted, rtol=0, atol=error)


def test_log_probs(params, model, tokenizer):
  """Of completions after prompts of several lengths, in tiles of tokens."""
  rows = [ids_of(tokenizer, TEXTS[n]) for n in ('English', 'German', 'code')]
  starts, length = [5, 3, 7], 8
  width = max(starts)
  tokens = np.zeros((3, width), np.int32)
  completion = np.zeros((3, 1, length), np.int32)
  for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
    tokens[i, width - start :] = row[:start]
    completion[i, 0] = row[start : start + length]
  mask = np.arange(width) >= width - np.array(starts)[:, None]
  prompts = Prompts(tokens, mask, np.arange(3), np.ones(3, np.float32))
  found = jax.jit(
    lambda params: log_probs.log_probs(
      policy(), params, prompts, completion, np.ones(completion.shape, bool),
      chunk=16,
    )
  )(params)  # fmt: skip
  for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
    logits = theirs(model, row[: start + length])[start - 1 : -1]
    wanted = torch.log_softmax(torch.tensor(logits), -1).numpy()
    wanted = wanted[range(length), row[start : start + length]]
    np.testing.assert_allclose(found[i, 0].sum(), wanted.sum(), atol=2e-3)


def greedy(params, tokens):
  """The likeliest tokens, with our cache."""
  prompt = jnp.array([tokens])

  @jax.jit
  def decode(params):
    decoder = policy().decoder(policy().prepare(params))
    hidden, prefix = decoder.prefill(prompt, prompt >= 0)
    first = decoder.logits(hidden).argmax(-1)

    def step(state, _):
      token, cache = state
      hidden, cache = decoder.step(token, jnp.ones(1, bool), cache)
      return (decoder.logits(hidden).argmax(-1), cache), token

    cache = decoder.start(prefix, 1, NEW)
    return jax.lax.scan(step, (first, cache), None, length=NEW)[1][:, 0]

  return np.asarray(decode(params)).tolist()


PROMPTS = 'The film is', '日本の首都は', 'def fibonacci(n):'


@pytest.fixture(scope='session')
def continuations(params, tokenizer):
  return [greedy(params, ids_of(tokenizer, text)) for text in PROMPTS]


def test_greedy_text(continuations, model, tokenizer):
  for text, found in zip(PROMPTS, continuations, strict=True):
    tokens = torch.tensor([ids_of(tokenizer, text)])
    out = model.generate(
      tokens, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    assert out[0, tokens.shape[1] :].tolist() == found, text


# -- Out again

_LLAMA = """
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = sys.argv[1], 512, 1
params.warmup = False
server = xllamacpp.Server(params)
out = []
for prompt in json.loads(sys.argv[2]):
  answer = server.handle_completions(dict(
    prompt=prompt, max_tokens=int(sys.argv[3]), temperature=0.0, top_k=1,
    ignore_eos=True, cache_prompt=False,
  ))
  answer = answer if isinstance(answer, dict) else json.loads(answer)
  out.append(answer['choices'][0]['text'])
print(json.dumps(out))
"""


def test_out_to_llama_cpp_and_back(params, continuations, tokenizer, tmp_path,
                                   folder):  # fmt: skip
  """Our file says the same in llama.cpp, in other bits nearly, and here."""
  pytest.importorskip('xllamacpp', reason=why)
  out = tmp_path / 'out'
  kwargs = dict(dtype='float32', tokenizer_path=folder)
  writer.export(params, CONFIG, str(out), **kwargs)
  file = str(out / writer.FILE)
  process = subprocess.run(
    [sys.executable, '-c', _LLAMA, file, json.dumps(PROMPTS), str(NEW)],
    capture_output=True, text=True,
  )  # fmt: skip
  assert process.returncode == 0, process.stderr[-2000:]
  said = json.loads(process.stdout.splitlines()[-1])
  assert said == [tokenizer.decode(x) for x in continuations]
  back = official.load(file, CONFIG, like())
  jax.tree.map(
    # One is added to the scales of norms, and taken off again.
    lambda a, b: np.testing.assert_allclose(a, b, 0, 1e-5), back, params
  )  # fmt: skip
