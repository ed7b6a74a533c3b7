"""A vocabulary of Gemma's kind: bytes, digits, turns."""

import io
import os

import sentencepiece

from bond_jax.data import tokenizer as tokenizer_lib

TEXTS = [
  'the film was good', ' a  story, and it is 27 minutes\nlong', '',
  'everyone loved it', 'é is rare',
]  # fmt: skip


def vocabulary(folder, turns=True):
  """Trains one on TEXTS, in spm.model, whose path it returns."""
  model = io.BytesIO()
  symbols = ['<mask>', *tokenizer_lib.TURNS[0], '\n', '\n\n']
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter([*TEXTS, 'user and model of a film'] * 4),
    model_writer=model, model_type='bpe', vocab_size=420 if turns else 64,
    pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece='<pad>',
    eos_piece='<eos>' if turns else '</s>',
    bos_piece='<bos>' if turns else '<s>', byte_fallback=turns,
    user_defined_symbols=symbols if turns else [], num_threads=1,
    normalization_rule_name='identity', add_dummy_prefix=False,
    remove_extra_whitespaces=False, split_digits=True, minloglevel=2,
    hard_vocab_limit=False,
  )  # fmt: skip
  path = os.path.join(folder, 'spm.model')
  with open(path, 'wb') as f:
    f.write(model.getvalue())
  return path
