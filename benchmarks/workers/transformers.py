"""transformers' `generate`, on a GPU where torch sees one."""

import functools
import os
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from benchmarks import workloads
from benchmarks.workers import serve


def sampler(model) -> serve.Call:
  vocab = model.config.vocab_size

  @functools.cache
  def prepared(workload):
    rows = workloads.tokens(workload, vocab)
    return [
      torch.as_tensor(x, dtype=torch.long, device=model.device)
      for x in workloads.batches(workload, rows)
    ]

  @functools.cache
  def threads(workload):
    """One or all cores, whichever is faster: small steps are overhead."""
    every = os.cpu_count()
    first = prepared(workload)[0]
    few = min(16, workload.new_tokens)
    taken = {}
    for count in (every, 1, every, 1):  # the second time without warming up
      torch.set_num_threads(count)
      start = time.perf_counter()
      generate(first, workload._replace(new_tokens=few, stop=False))
      taken[count] = time.perf_counter() - start
    return min(taken, key=taken.get)

  @torch.inference_mode()
  def generate(rows, workload):
    """New tokens of a batch, on the host."""
    stops = workloads.stop_ids(workload)
    model.generation_config = GenerationConfig(
      do_sample=True,
      temperature=1.0,
      top_k=0,
      top_p=1.0,
      max_new_tokens=workload.new_tokens,
      num_return_sequences=workload.n,
      eos_token_id=list(stops) or None,
      pad_token_id=0,
    )
    out = model.generate(rows, attention_mask=torch.ones_like(rows))
    return out[:, rows.shape[1] :].cpu().numpy()

  def call(workload, seed):
    torch.set_num_threads(threads(workload))
    torch.manual_seed(seed)
    stops, found = workloads.stop_ids(workload), []
    for rows in prepared(workload):
      found += workloads.lengths(generate(rows, workload), stops)
    return found

  return call


def open_(folder: str, model: str = '', dtype: str = ''):
  """The tiny model, one of a public size with random weights, or a path's."""
  device = 'cuda' if torch.cuda.is_available() else 'cpu'
  if dtype:
    made = AutoModelForCausalLM.from_pretrained(
      model, dtype=getattr(torch, dtype)
    )
  elif model:
    config = AutoConfig.from_pretrained(os.path.join(folder, model))
    with torch.device(device):
      made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
  else:
    made = AutoModelForCausalLM.from_pretrained(
      os.path.join(folder, 'huggingface'), dtype=torch.float32
    )
  made = made.to(device).eval()
  hello = dict(
    versions=serve.versions('transformers', 'torch'),
    device=torch.cuda.get_device_name() if device == 'cuda' else 'cpu',
    attention=made.config._attn_implementation,
  )
  return dict(sample=sampler(made)), hello


if __name__ == '__main__':
  serve.serve(open_)
