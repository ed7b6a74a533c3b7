"""Tunix: its `Sampler`, and a step of its GRPO."""

import functools
import itertools
import os
import queue
import threading

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tunix.generate import sampler as sampler_lib
from tunix.models.gemma3 import model as model_lib
from tunix.models.gemma3 import params as params_lib
from tunix.rl import rl_cluster as cluster_lib
from tunix.rl.grpo import grpo_learner
from tunix.rl.rollout import base_rollout

from benchmarks import workloads
from benchmarks.workers import serve


class _Numbers:
  """Reads ids written in figures; text is not measured, and none is made."""

  encode = staticmethod(workloads.ids)
  decode = staticmethod(lambda ids, **_: '')
  bos_id = staticmethod(lambda: 0)  # none is put in front
  eos_id = staticmethod(lambda: -1)  # cannot be drawn
  pad_id = staticmethod(lambda: 0)


def make_model(folder: str, mesh) -> model_lib.Gemma3:
  """The sizes of bond_jax's gemma3_tiny, and its weights."""
  kinds = model_lib.AttentionType
  # The one thing that its config does not say.
  model_lib.GEMMA3_ATTENTION_PATTERN = (kinds.LOCAL_SLIDING, kinds.GLOBAL)
  config = model_lib.ModelConfig(
    num_layers=3,
    num_embed=workloads.VOCAB,
    embed_dim=128,
    hidden_dim=640,
    num_heads=4,
    head_dim=32,
    num_kv_heads=2,
    sliding_window_size=16,
    local_base_frequency=10_000,
    global_base_frequency=1_000_000,
    param_dtype=jnp.float32,
  )
  upstream = {}
  with np.load(os.path.join(folder, 'weights.npz')) as arrays:
    for name in arrays.files:
      path, _, leaf = name.rpartition('/')
      if path.endswith('/mlp'):  # a module of its own in the official tree
        path, leaf = name, 'w'
      upstream.setdefault(f'transformer/{path}', {})[leaf] = arrays[name]
  tree = params_lib.map_from_upstream_checkpoint(upstream)
  with mesh:
    model = model_lib.Gemma3(config, rngs=nnx.Rngs(0))
    shapes = lambda x: jax.tree.map(jnp.shape, x)
    mine = nnx.to_pure_dict(nnx.state(model))
    if shapes(mine) != shapes(tree):
      raise ValueError(f'{shapes(mine)} expected, got {shapes(tree)}')
    nnx.update(model, jax.tree.map(jnp.asarray, tree))
  return model


def cache_size(workload) -> int:
  return workload.prompt_length + workload.new_tokens


def sampler(model) -> serve.Call:
  @functools.cache
  def prepared(workload):
    config = model.config
    # One for each workload: the compiled loop keeps the stops it met first.
    sampler = sampler_lib.Sampler(
      model,
      _Numbers(),
      sampler_lib.CacheConfig(
        cache_size=cache_size(workload),
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
      ),
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
      out = sampler(
        texts,
        max_generation_steps=workload.new_tokens,
        max_prompt_length=workload.prompt_length,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=list(workloads.stop_ids(workload)) or None,
        seed=seed_,
      )
      # What it returns leaves the stop itself out.
      longest = workload.new_tokens
      found += [min(len(x) + 1, longest) for x in out.tokens]
    return found

  return call


def grpo(model, reference, mesh, workload):
  """A function that makes the learner, in a thread, do one step."""
  roles = cluster_lib.Role
  cluster = cluster_lib.RLCluster(
    actor=model,
    reference=reference,
    tokenizer=_Numbers(),
    cluster_config=cluster_lib.ClusterConfig(
      role_to_mesh=dict.fromkeys(
        (roles.ACTOR, roles.REFERENCE, roles.ROLLOUT), mesh
      ),
      training_config=cluster_lib.RLTrainingConfig(
        actor_optimizer=optax.chain(
          optax.clip_by_global_norm(1.0), optax.adam(1e-7, b2=0.99)
        ),
        eval_every_n_steps=10**9,
        max_steps=10**9,
      ),
      rollout_config=base_rollout.RolloutConfig(
        max_tokens_to_generate=workload.new_tokens,
        max_prompt_length=workload.prompt_length,
        kv_cache_size=cache_size(workload),
        temperature=1.0,
      ),
    ),
  )
  learner = grpo_learner.GRPOLearner(
    rl_cluster=cluster,
    algo_config=grpo_learner.GRPOConfig(num_generations=workload.n),
    reward_fns=lambda completions, **_: list(
      map(float, itertools.islice(itertools.cycle(range(3)), len(completions)))
    ),
  )
  texts = np.array([workloads.text(x) for x in workloads.tokens(workload)])
  asked, done = queue.Queue(), queue.Queue()

  def batches():
    while True:
      asked.get()
      yield {'prompts': texts}
      # Asked for the next batch: the step on this one is over, or under way.
      jax.block_until_ready(nnx.state(cluster.actor_trainer.model))
      done.put(None)

  def train():
    try:
      learner.train(batches())
      done.put(RuntimeError('training ended'))
    except Exception as error:
      done.put(error)

  threading.Thread(target=train, daemon=True).start()

  def step():
    asked.put(None)
    if error := done.get():
      raise error

  return step


def open_(folder: str):
  devices = np.array(jax.devices()[:1]).reshape(1, 1)
  mesh = jax.sharding.Mesh(devices, ('fsdp', 'tp'))
  model = lambda: make_model(folder, mesh)

  @functools.cache
  def learner(workload):
    return grpo(model(), model(), mesh, workload)

  def step(workload, seed):
    learner(workload)()
    return [workload.new_tokens] * (workload.prompts * workload.n)

  hello = dict(
    versions=serve.versions('google-tunix', 'jax', 'flax'),
    device=jax.devices()[0].device_kind,
  )
  return dict(sample=sampler(model()), step=step), hello


if __name__ == '__main__':
  serve.serve(open_)
