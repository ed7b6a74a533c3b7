"""TRL: a step of its RLOO with LoRA adapters, as its trainer runs it."""

import functools
import queue
import re
import tempfile
import threading

import datasets
import peft
import torch
import transformers
import trl

from benchmarks.workers import serve


class _OneByOne(transformers.TrainerCallback):
  """Holds the trainer before each step until it is asked for one."""

  def __init__(self):
    self.asked, self.done = queue.Queue(), queue.Queue()

  def on_step_end(self, *_, **__):
    self.done.put(None)
    self.asked.get()


def prompts_of(tokenizer, workload) -> list[str]:
  """Texts of as many tokens as the workload's prompts have, BOS included."""
  words = sorted(
    tokenizer.convert_tokens_to_string([piece]).strip()
    for piece in tokenizer.get_vocab()
    if re.fullmatch('▁[a-z]{4,8}', piece)
  )
  size = workload.prompt_length - 1
  texts = [
    ' '.join(['The', *words[i * 1000 : i * 1000 + size - 1]])
    for i in range(workload.prompts)
  ]
  lengths = {len(tokenizer(text).input_ids) for text in texts}
  if lengths != {workload.prompt_length}:
    raise ValueError(f'prompts of {lengths} tokens')
  return texts


def open_step(folder: str, dtype: str, workload):
  """A function that makes the trainer, in a thread, do one step."""
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=getattr(torch, dtype)
  )
  rows, one = workload.prompts * workload.n, _OneByOne()
  texts = prompts_of(tokenizer, workload)
  trainer = trl.RLOOTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=lambda completion_ids, **_: [
      float(sum(i % 2 == 0 for i in ids)) for ids in completion_ids
    ],
    train_dataset=datasets.Dataset.from_dict({'prompt': texts}),
    peft_config=peft.LoraConfig(
      r=8, lora_alpha=8, target_modules='all-linear', task_type='CAUSAL_LM'
    ),
    args=trl.RLOOConfig(
      output_dir=tempfile.mkdtemp(),
      per_device_train_batch_size=rows,
      num_generations=workload.n,
      max_completion_length=workload.new_tokens,
      generation_kwargs=dict(min_new_tokens=workload.new_tokens),
      learning_rate=1e-7,
      max_steps=10**6,
      save_strategy='no',
      logging_strategy='no',
      report_to='none',
      disable_tqdm=True,
      gradient_checkpointing=False,  # as ours, which has the memory
      bf16=False,
      use_cpu=not torch.cuda.is_available(),
      pad_to_multiple_of=None,
    ),
    callbacks=[one],
  )

  def train():
    try:
      trainer.train()
      one.done.put(RuntimeError('training ended'))
    except Exception as error:
      one.done.put(error)

  thread = threading.Thread(target=train, daemon=True)

  def step():
    if thread.is_alive():
      one.asked.put(None)
    else:
      thread.start()
    if error := one.done.get():
      raise error

  return step


def open_(folder: str, model: str, dtype: str):
  del folder
  opened = functools.cache(functools.partial(open_step, model, dtype))

  def step(workload, seed):
    opened(workload)()
    return [workload.new_tokens] * (workload.prompts * workload.n)

  hello = dict(
    versions=serve.versions('trl', 'transformers', 'peft', 'torch'),
    device=torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu',
  )
  return dict(step=step), hello


if __name__ == '__main__':
  serve.serve(open_)
