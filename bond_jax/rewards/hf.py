"""Rewards that are Hugging Face sequence classifiers, run by torch.

An optional extra, requirements-hf.txt: torch and transformers are imported when
a reward is made. A model is a local folder or owner/name@commit; code that
comes with one is never run. In float32 on a CPU, on a GPU as it was saved.
"""

from collections.abc import Callable, Mapping, Sequence
import re
from typing import Any, NamedTuple

from absl import logging
import numpy as np
import scipy.special

from bond_jax.errors import UserError
from bond_jax.rewards import answers, judge
from bond_jax.rewards.text import judged
from bond_jax.types import PreferenceFn, RewardFn
from bond_jax.weights.huggingface import reader

# The order of PairRM: the prompt, then the two answers.
TEMPLATE = '<|source|>{prompt}<|candidate1|>{a}<|candidate2|>{b}'

Texts = Sequence[tuple[str, ...]]  # [X] of one text, or of two that are a pair


class Model(NamedTuple):
  """A loaded classifier with C outputs."""

  path: str
  tokenizer: Any
  labels: list[str]  # C
  independent: bool  # each output has a probability of its own
  logits: Callable[[Texts], np.ndarray]  # -> f64[X, C]


def classifier(
  path: str,
  label: str | int | None = None,
  chat: bool = False,
  batch: int = 16,
  length: int = 512,
  device: str = '',
) -> RewardFn:
  """Returns the score of a classifier, or the log-odds of one of its labels.

  Args:
    path: a folder, or owner/name@commit.
    label: by name or number, of a model with several outputs; the reward is
      log p / (1 - p) of it, in nats. With one output the reward is that.
    chat: the text is the row's messages and the completion, in the template of
      the model's tokenizer; else what `text.judged` returns.
    batch: texts at a time.
    length: tokens of the longest text; of longer ones the beginning is cut.
    device: of torch; '' = 'cuda' where there is one, else 'cpu'.
  """
  model = _load(path, batch, length, device, side='left', add_special=not chat)
  index = _index(model, label)
  if chat and not model.tokenizer.chat_template:
    raise UserError(f'{path} has no chat template; set chat=False.')

  def classifier_reward(prompts, completions, context):
    if chat:
      texts = _conversations(model.tokenizer, prompts, completions, context)
    else:
      texts = judged(prompts, completions, context)
    logits = model.logits([(text,) for text in texts])
    value = logits[:, index]
    if len(model.labels) > 1 and not model.independent:  # log-odds of a softmax
      others = np.delete(logits, index, axis=1)
      value = value - scipy.special.logsumexp(others, axis=1)
    return value.reshape(len(prompts), -1)

  return classifier_reward


def entailment(
  path: str,
  premise: str = 'document',
  batch: int = 16,
  length: int = 512,
  device: str = '',
) -> RewardFn:
  """Returns log P(a field of the row entails the completion), in nats.

  The setting of BOND's experiments on XSum (2407.14622, section 4), with their
  model (Roit et al., 2023) replaced by any that was trained on NLI; see
  docs/rewards.md for the logarithm.

  Args:
    path: of a model with a label 'entailment'.
    premise: the field. Of premises that are too long the end is cut.
    batch, length, device: see `classifier`; of pairs.
  """
  model = _load(path, batch, length, device, side='right', add_special=True)
  index = _index(model, 'entailment')

  def entailment_reward(prompts, completions, context):
    pairs = [
      (_field(row, premise), y)
      for row, ys in zip(context.rows, completions)
      for y in ys
    ]
    value = scipy.special.log_softmax(model.logits(pairs), axis=1)[:, index]
    return value.reshape(len(prompts), -1)

  return entailment_reward


def pair_judge(
  path: str,
  template: str = TEMPLATE,
  batch: int = 16,
  length: int = 512,
  device: str = '',
) -> PreferenceFn:
  """Returns the judge whose P(a beats b) is the sigmoid of a model's output.

  Every pair is asked about in both orders; see `judge.all_at_once`.

  Args:
    path: of a model with one output.
    template: of the text, with {prompt}, {a} and {b}.
    batch, length, device: see `classifier`.
  """
  hole = re.compile(r'\{(prompt|a|b)\}')
  if sorted(hole.findall(template)) != ['a', 'b', 'prompt']:
    raise UserError(
      f'template is {template!r}; it needs {{prompt}}, {{a}} and {{b}}, once.'
    )
  model = _load(path, batch, length, device, side='left', add_special=True)
  if len(model.labels) != 1:
    raise UserError(
      f'{path} has {len(model.labels)} outputs, a judge of pairs has 1.'
    )

  def filled(pair: judge.Pair) -> str:
    return hole.sub(lambda match: getattr(pair, match[1]), template)

  def compare(pairs: Sequence[judge.Pair]) -> np.ndarray:
    logits = model.logits([(filled(pair),) for pair in pairs])
    return scipy.special.expit(logits[:, 0])

  return judge.all_at_once(compare)


def _index(model: Model, label: str | int | None) -> int:
  """The output that a label names."""
  if (several := len(model.labels) > 1) or label is not None:
    names = [name.lower() for name in model.labels]
    found = label
    if isinstance(label, str) and names.count(label.lower()) == 1:
      found = names.index(label.lower())
    if not several or found not in range(len(names)):
      raise UserError(
        f'{model.path} has the label{"s" * several} {", ".join(model.labels)};'
        f' got label {label!r}, expected'
        f' {"one of them" if several else "none: it has one output"}.'
      )
    return found
  return 0


def _field(row: Mapping[str, Any], name: str) -> str:
  if row.get(name) is None:
    raise UserError(
      f'a row has no field {name!r}, which is to entail the completion; it has'
      f' {", ".join(row) or "none"}; name another with reward.args.premise.'
    )
  value = row[name]
  return value.decode('utf-8') if isinstance(value, bytes) else value


def _conversations(tokenizer, prompts, completions, context) -> list[str]:
  """The turns that were read, or the prompt as the only one, and the answer."""
  found = []
  for prompt, ys, row in zip(prompts, completions, context.rows):
    turns = context.turns and row.get('messages')
    turns = turns or [{'role': 'user', 'content': prompt}]
    for y in ys:
      talk = [*turns, {'role': 'assistant', 'content': y}]
      found.append(tokenizer.apply_chat_template(talk, tokenize=False))
  return found


def _read(path: str, device: str):
  """The tokenizer and the network of a checkpoint; on a device, '' = any."""
  try:
    import torch
    import transformers
  except ModuleNotFoundError as e:
    raise UserError(
      'rewards from Hugging Face need the packages torch and transformers'
      f' ({e.name} is missing); pip install -r requirements-hf.txt.'
    ) from e
  device = device or ('cuda' if torch.cuda.is_available() else 'cpu')
  folder = reader.resolve(path)
  here = dict(local_files_only=True, trust_remote_code=False)
  loader = transformers.AutoModelForSequenceClassification
  try:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **here)
    network, info = loader.from_pretrained(
      folder,
      use_safetensors=True,  # other files of weights are pickles
      dtype=torch.float32 if device == 'cpu' else 'auto',
      output_loading_info=True,
      **here,
    )
    network = network.eval().requires_grad_(False).to(device)
  except Exception as e:
    raise UserError(
      f'{path} cannot be loaded as a sequence classifier on {device}:'
      f' {answers.reason(e)[:300]}'
    ) from e
  if missing := sorted(info['missing_keys']):
    raise UserError(
      f'{path} is no trained classifier: its weights lack'
      f' {", ".join(missing[:3])}, which would be random.'
    )
  return tokenizer, network


def _load(
  path: str,
  batch: int,
  length: int,
  device: str,
  *,
  side: str,
  add_special: bool,
) -> Model:
  """Loads a `classifier`.

  Longer texts are cut on one `side`; of pairs the first text is. Where not
  `add_special`, texts have the tokenizer's own tokens already.
  """
  tokenizer, network = _read(path, device)
  config, tell = network.config, [True]
  if batch < 1 or length < 1:
    raise UserError(
      f'{path}: batch ({batch}) and length ({length}) must be 1 or more.'
    )
  places = getattr(config.get_text_config(), 'max_position_embeddings', None)
  limit = min(x for x in (tokenizer.model_max_length, places) if x and x > 0)
  if length > limit:
    raise UserError(
      f'{path} reads {limit} tokens at most, length is {length}; set'
      f' length={limit}.'
    )
  tokenizer.truncation_side, tokenizer.padding_side = side, 'right'
  # A causal model scores the last token that is not its padding.
  token = tokenizer.pad_token_id
  if token is None or token != config.get_text_config().pad_token_id:
    batch = 1

  def logits(texts: Texts) -> np.ndarray:
    encoded = [_encode(tokenizer, t, length, add_special) for t in texts]
    if (cut := sum(was_cut for _, was_cut in encoded)) and tell:
      tell.clear()
      logging.warning(
        '%s: %d of %d texts have more than %d tokens, and were cut on the %s;'
        ' later ones are cut without a word.',
        path, cut, len(texts), length, side,
      )  # fmt: skip
    # Texts of about one length go together, so that little is padded.
    order = np.argsort([len(x['input_ids']) for x, _ in encoded])
    found = np.zeros((len(texts), config.num_labels))
    for i in range(0, len(order), batch):
      rows = order[i : i + batch]
      some = tokenizer.pad(
        [encoded[k][0] for k in rows], padding=batch > 1, return_tensors='pt'
      )
      out = network(**some.to(network.device)).logits
      found[rows] = out.double().cpu().numpy()
    return found

  labels = [config.id2label.get(i, str(i)) for i in range(config.num_labels)]
  independent = config.problem_type == 'multi_label_classification'
  return Model(path, tokenizer, labels, independent, logits)


def _encode(tokenizer, texts: tuple[str, ...], length: int, add_special: bool):
  """The tokens of a text or a pair, and whether they had to be cut."""
  how = dict(add_special_tokens=add_special, verbose=False)
  whole = tokenizer(*texts, **how)
  if len(whole['input_ids']) <= length:
    return whole, False
  truncation = 'only_first'
  if len(texts) == 2:
    second = tokenizer(texts[1], add_special_tokens=False)['input_ids']
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if len(second) + special >= length:
      truncation = 'longest_first'
  cut = tokenizer(*texts, truncation=truncation, max_length=length, **how)
  return cut, True
