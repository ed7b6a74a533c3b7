"""Rewards that are Hugging Face classifiers: tiny ones, saved and loaded."""

import logging
import os
import re

os.environ['HF_HUB_OFFLINE'] = '1'  # this process asks nobody

import numpy as np
import pytest
import toy

from bond_jax.errors import UserError
from bond_jax.rewards import calling, hf, make

why = 'needs requirements-hf.txt'
torch = pytest.importorskip('torch', reason=why)
tokenizers = pytest.importorskip('tokenizers', reason=why)
transformers = pytest.importorskip('transformers', reason=why)

WORDS = [
    'the', 'film', 'was', 'good', 'bad', 'long', 'and', 'a', 'story', 'of',
    'it', 'user', 'assistant',
]  # fmt: skip
SPECIAL = ['[PAD]', '[UNK]', '[CLS]', '[SEP]']
NLI = {0: 'CONTRADICTION', 1: 'NEUTRAL', 2: 'Entailment'}
LIMIT = 40  # tokens that the models read
PROMPTS = ['the film', 'a long long long story', 'it']
COMPLETIONS = [
  [' was good', ' was bad and long and bad', ''],
  [' of it', ' was bad', ' it it it it it it it it'],
  [' was', ' was good', ' and the film and the story was good'],
]
ROWS = [{'document': 'the film was long'}, {'document': 'it'},
        {'document': b'a good story and a bad film'}]  # fmt: skip
CONTEXT = toy.context(COMPLETIONS, rows=ROWS)
BATCH = PROMPTS, COMPLETIONS, CONTEXT
TEXTS = [p + y for p, ys in zip(PROMPTS, COMPLETIONS) for y in ys]
TEMPLATE = (
  '{% for m in messages %}{{ m.role }} {{ m.content }} [SEP]{% endfor %}'
)


@pytest.fixture(autouse=True)
def one_thread():
  torch.set_num_threads(1)


@pytest.fixture
def said():
  """What is logged."""
  lines = []
  handler = logging.Handler()
  handler.emit = lambda record: lines.append(record.getMessage())
  hf.logging.get_absl_logger().addHandler(handler)
  yield lines
  hf.logging.get_absl_logger().removeHandler(handler)


def tokenizer(pad='[PAD]', template=None):
  vocab = {word: i for i, word in enumerate(SPECIAL + WORDS)}
  own = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token='[UNK]')
  )
  own.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  own.post_processor = tokenizers.processors.TemplateProcessing(
    single='[CLS] $A [SEP]',
    pair='[CLS] $A [SEP] $B:1 [SEP]:1',
    special_tokens=[('[CLS]', 2), ('[SEP]', 3)],
  )
  found = transformers.PreTrainedTokenizerFast(
    tokenizer_object=own, unk_token='[UNK]', pad_token=pad, cls_token='[CLS]',
    sep_token='[SEP]', padding_side='left', model_max_length=LIMIT,
    model_input_names=['input_ids', 'token_type_ids', 'attention_mask'],
  )  # fmt: skip
  found.chat_template = template
  return found


def saved(folder, kind='bert', tokens=None, cls=None, **settings):
  """Saves a tiny model with random weights; returns its path, and itself."""
  sizes = dict(
    vocab_size=len(SPECIAL + WORDS), hidden_size=16, intermediate_size=24,
    num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64,
    pad_token_id=0,
  )  # fmt: skip
  if kind == 'gemma3_text':
    sizes.update(num_key_value_heads=1, head_dim=8, sliding_window=8)
  config = transformers.AutoConfig.for_model(kind, **{**sizes, **settings})
  torch.manual_seed(len(kind) + config.num_labels)
  cls = cls or transformers.AutoModelForSequenceClassification
  model = cls.from_config(config)
  with torch.no_grad():
    for name, w in model.named_parameters():
      w.normal_(std=0.5)
      w += 'LayerNorm.weight' in name
  path = str(folder / 'model')
  model.save_pretrained(path)
  (tokens or tokenizer()).save_pretrained(path)
  return path, model.eval()


def one_at_a_time(model, texts, special=True):
  """The outputs for each text or pair alone, f64[X, C]."""
  found = []
  for text in texts:
    pair = text if isinstance(text, tuple) else (text,)
    ids = tokenizer()(*pair, add_special_tokens=special, return_tensors='pt')
    if model.config.model_type != 'bert':
      ids.pop('token_type_ids')
    with torch.no_grad():
      found.append(model(**ids).logits[0].double().numpy())
  return np.array(found)


def close(got, expected):
  assert np.ptp(got) > 0.1
  np.testing.assert_allclose(got, np.reshape(expected, got.shape), atol=1e-6)


@pytest.mark.parametrize('batch', [1, 4, 64])
@pytest.mark.parametrize('kind', ['bert', 'gemma3_text'])
def test_one_output_is_the_score(tmp_path, kind, batch):
  """Of texts of 4 to 15 tokens: padding changes nothing."""
  tokens = tokenizer()
  if kind != 'bert':
    tokens.model_input_names = ['input_ids', 'attention_mask']
  path, model = saved(tmp_path, kind, tokens, num_labels=1)
  got = hf.classifier(path, batch=batch, length=LIMIT)(*BATCH)
  assert got.shape == (3, 3)
  close(got, one_at_a_time(model, TEXTS)[:, 0])
  assert len({len(text.split()) for text in TEXTS}) > 5


def test_turns_are_judged_by_the_answer_alone(tmp_path):
  path, model = saved(tmp_path, num_labels=1)
  texts = [['was good', 'bad']] * 3
  asked = PROMPTS, texts, toy.context(texts, turns=True)
  got = hf.classifier(path, length=LIMIT)(*asked)
  close(got[2], one_at_a_time(model, texts[2])[:, 0])


def test_a_model_without_a_padding_token(tmp_path):
  """It scores the last token, and cannot tell which one is padding."""
  tokens = tokenizer(pad=None)
  tokens.model_input_names = ['input_ids', 'attention_mask']
  path, model = saved(
    tmp_path, 'gemma3_text', tokens, num_labels=1, pad_token_id=None
  )
  got = hf.classifier(path, batch=16, length=LIMIT)(*BATCH)
  close(got, one_at_a_time(model, TEXTS)[:, 0])


@pytest.mark.parametrize(
  'label, index', [('entailment', 2), ('NEUTRAL', 1), (0, 0), (2, 2)]
)
def test_the_log_odds_of_a_label(tmp_path, label, index):
  path, model = saved(tmp_path, id2label=NLI)
  got = hf.classifier(path, label, length=LIMIT)(*BATCH)
  e = np.exp(one_at_a_time(model, TEXTS))
  p = e[:, index] / e.sum(1)
  close(got, np.log(p / (1 - p)))


def test_labels_that_do_not_exclude_each_other(tmp_path):
  """A sigmoid each: the log-odds of a label are its output."""
  path, model = saved(
    tmp_path, id2label=NLI, problem_type='multi_label_classification'
  )
  got = hf.classifier(path, 1, length=LIMIT)(*BATCH)
  close(got, one_at_a_time(model, TEXTS)[:, 1])


def test_labels_that_are_not_there(tmp_path):
  path, _ = saved(tmp_path, id2label=NLI)
  for label in (None, 'good', 3, -1):
    with pytest.raises(UserError) as e:
      hf.classifier(path, label, length=LIMIT)
    assert str(e.value) == (
      f'{path} has the labels CONTRADICTION, NEUTRAL, Entailment; got label'
      f' {label!r}, expected one of them.'
    )
  two = {0: 'not_entailment', 1: 'other'}
  (tmp_path / 'two').mkdir()
  path, _ = saved(tmp_path / 'two', id2label=two)
  with pytest.raises(UserError, match="not_entailment, other; got .*'entail"):
    hf.entailment(path, length=LIMIT)
  (tmp_path / 'one').mkdir()
  path, _ = saved(tmp_path / 'one', num_labels=1)
  with pytest.raises(UserError, match='got label 0, expected none: it has one'):
    hf.classifier(path, 0, length=LIMIT)


def test_the_template_of_the_model_s_own_tokenizer(tmp_path):
  path, model = saved(tmp_path, tokens=tokenizer(template=TEMPLATE),
                      num_labels=1)  # fmt: skip
  talk = [
    {'role': 'user', 'content': 'the film'},
    {'role': 'assistant', 'content': 'was long'},
    {'role': 'user', 'content': 'a story'},
  ]
  texts = [['good', 'bad and bad'], ['it was', 'it']]
  context = toy.context(texts, rows=[{'messages': talk}, {}], turns=True)
  got = hf.classifier(path, chat=True, length=LIMIT)(
    ['a story', 'of it'], texts, context
  )
  before = 'user the film [SEP]assistant was long [SEP]user a story [SEP]'
  written = [f'{before}assistant {y} [SEP]' for y in texts[0]]
  written += [f'user of it [SEP]assistant {y} [SEP]' for y in texts[1]]
  close(got, one_at_a_time(model, written, special=False)[:, 0])
  # Where the prompt is a text, the model has not read the row's messages.
  got = hf.classifier(path, chat=True, length=LIMIT)(
    ['a story', 'of it'], texts, context._replace(turns=False)
  )
  written[:2] = [f'user a story [SEP]assistant {y} [SEP]' for y in texts[0]]
  close(got, one_at_a_time(model, written, special=False)[:, 0])


def test_a_tokenizer_without_a_template(tmp_path):
  path, _ = saved(tmp_path, num_labels=1)
  with pytest.raises(UserError, match='has no chat template; set chat=False'):
    hf.classifier(path, chat=True, length=LIMIT)


def test_long_texts_lose_their_beginning(tmp_path, said):
  """And keep the completion; said once, with their number."""
  path, model = saved(tmp_path, num_labels=1)
  reward = hf.classifier(path, length=8)  # six words beside CLS and SEP
  short = [' '.join(text.split()[-6:]) for text in TEXTS]
  for _ in range(2):
    close(reward(*BATCH), one_at_a_time(model, short)[:, 0])
  cut = sum(len(text.split()) > 6 for text in TEXTS)
  assert 2 < cut < len(TEXTS) and len(said) == 1
  assert f'{cut} of 9 texts have more than 8 tokens' in said[0]
  assert 'cut on the left' in said[0]
  hf.classifier(path, length=LIMIT)(*BATCH)
  assert len(said) == 1


def test_entailment_of_the_completion_by_a_field(tmp_path):
  path, model = saved(tmp_path, id2label=NLI)
  got = hf.entailment(path, batch=4, length=LIMIT)(*BATCH)
  documents = ['the film was long', 'it', 'a good story and a bad film']
  pairs = [(d, y) for d, ys in zip(documents, COMPLETIONS) for y in ys]
  e = np.exp(one_at_a_time(model, pairs))
  close(got, np.log(e[:, 2] / e.sum(1)))
  assert (got < 0).all()


def test_long_premises_lose_their_end(tmp_path, said):
  path, model = saved(tmp_path, id2label=NLI)
  words = WORDS[:11]
  rows = [{'source': ' '.join(words)}]
  completions = [['bad story', ' '.join(words[::-1])]]
  reward = hf.entailment(path, premise='source', length=10)
  got = reward(['x'], completions, toy.context(completions, rows=rows))
  # Seven words beside CLS and two SEP: five of the premise; then 4 and 3.
  pairs = [(' '.join(words[:5]), 'bad story')]
  e = np.exp(one_at_a_time(model, pairs))
  np.testing.assert_allclose(got[0, 0], np.log(e[0, 2] / e.sum()), atol=1e-6)
  both = [(' '.join(words[:n]), ' '.join(words[::-1][: 7 - n])) for n in (3, 4)]
  e = np.exp(one_at_a_time(model, both))
  assert np.abs(np.log(e[:, 2] / e.sum(1)) - got[0, 1]).min() < 1e-6
  assert '2 of 2 texts have more than 10 tokens' in said[0]
  assert 'cut on the right' in said[0]


def test_a_field_that_is_not_there(tmp_path):
  path, _ = saved(tmp_path, id2label=NLI)
  reward = hf.entailment(path, premise='article', length=LIMIT)
  with pytest.raises(UserError, match="no field 'article'.* it has document;"):
    reward(*BATCH)


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_a_judge_of_pairs_in_both_orders(tmp_path):
  path, model = saved(tmp_path, num_labels=1)
  template = 'user {prompt} assistant {a} assistant {b}'
  # What stands in a text is not filled in again.
  prompts = ['the {a} film', *PROMPTS[1:]]
  reward = hf.pair_judge(path, template, batch=4, length=LIMIT)
  got = reward(prompts, COMPLETIONS, CONTEXT)
  assert got.shape == (3, 3, 3)
  np.testing.assert_array_equal(got + got.swapaxes(1, 2), np.ones((3, 3, 3)))
  for p, ys, win in zip(prompts, COMPLETIONS, got):
    s = lambda a, b, p=p: sigmoid(
      one_at_a_time(model, [f'user {p} assistant {a} assistant {b}'])
    )[0, 0]
    for i, a in enumerate(ys):
      for j, b in enumerate(ys):
        expected = 0.5 if i == j else (s(a, b) + 1 - s(b, a)) / 2
        assert abs(win[i, j] - expected) < 1e-6
  assert np.ptp(got) > 0.02
  value, _ = calling.call(reward, prompts, COMPLETIONS, CONTEXT)
  np.testing.assert_allclose(value, got, atol=1e-7)


def test_judges_that_are_none(tmp_path):
  path, _ = saved(tmp_path, id2label=NLI)
  with pytest.raises(UserError, match='has 3 outputs, a judge of pairs has 1'):
    hf.pair_judge(path, length=LIMIT)
  for template in ('{prompt} {a}', '{prompt} {a} {b} {b}', ''):
    with pytest.raises(UserError, match='it needs {prompt}, {a} and {b}, once'):
      hf.pair_judge(path, template)
  assert re.findall(r'{\w+}', hf.TEMPLATE) == ['{prompt}', '{a}', '{b}']


def test_a_model_whose_head_would_be_random(tmp_path):
  path, _ = saved(tmp_path, cls=transformers.AutoModel)
  with pytest.raises(UserError, match=r'no trained classifier.*classifier\.b'):
    hf.classifier(path, 0, length=LIMIT)


def test_what_cannot_be_loaded(tmp_path):
  with pytest.raises(UserError, match='and 40 hexadecimal digits'):
    hf.classifier('owner/name@main')
  (tmp_path / 'config.json').write_text('{}')
  with pytest.raises(UserError, match='cannot be loaded as a sequence') as e:
    hf.classifier(str(tmp_path))
  assert '\n' not in str(e.value)
  path, _ = saved(tmp_path, num_labels=1)
  with pytest.raises(UserError, match='reads 40 tokens at most, length is 512'):
    hf.classifier(path)
  with pytest.raises(UserError, match=r'batch \(0\) and length \(9\) must be'):
    hf.classifier(path, batch=0, length=9)
  with pytest.raises(UserError, match='on nowhere'):
    hf.classifier(path, device='nowhere', length=9)


# -- rewards of the user's own that use torch

VALUES = np.array([[0.5, 3, -2], [1, 1.5, 0], [2, -1, 4]])


@pytest.mark.parametrize(
  'answer',
  [
    lambda x: x.requires_grad_(),
    lambda x: x.bfloat16(),
    lambda x: x.half(),
    lambda x: 2 * (x / 2).bfloat16().requires_grad_(),
    lambda x: list(x.requires_grad_()),
    lambda x: [[y.bfloat16() for y in row] for row in x],
    lambda x: [[float(row[0]), *row[1:].requires_grad_()] for row in x],
    lambda x: {'a': x.requires_grad_() / 2, 'b': x.bfloat16() / 2},
  ],
)
def test_tensors_of_any_kind_are_numbers(answer):
  reward = lambda *_: answer(torch.tensor(VALUES, dtype=torch.float32))
  value, _ = calling.call(reward, *BATCH)
  np.testing.assert_array_equal(value, VALUES)


@pytest.mark.parametrize(
  'tensor',
  [
    torch.tensor(VALUES).to_sparse(),
    torch.empty(3, 3, device='meta'),
    torch.tensor(VALUES * 1j),
    torch.tensor(VALUES)[:, :2],
    [torch.tensor(VALUES)],
  ],
)
def test_other_tensors_are_one_line(tensor):
  with pytest.raises(UserError, match='reward .* returned') as e:
    calling.call(lambda *_: tensor, *BATCH)
  assert '\n' not in str(e.value)


def modes():
  """Thread-local: without gradients, and on a device without memory."""
  torch.set_grad_enabled(False)
  torch.set_default_device('meta')

  def lengths(prompts, completions, context):
    weight = torch.ones(1, requires_grad=True, device='cpu')
    assert torch.empty(1).device.type == 'meta'
    assert not (2 * weight).requires_grad
    return [[len(y) * float(weight) for y in ys] for ys in completions]

  return lengths


def test_modes_that_a_factory_sets_hold_in_every_call():
  reward = make.reward({'': make.Part('test_rewards_hf:modes', {})})
  submit, expected = (
    calling.worker(),
    [[len(y) for y in x] for x in COMPLETIONS],
  )
  for value, _ in (
    calling.call(reward, *BATCH),
    submit(calling.call, reward, *BATCH).result(),
  ):
    np.testing.assert_array_equal(value, expected)
  assert torch.is_grad_enabled() and torch.empty(1).device.type == 'cpu'
