"""On-policy distillation: the policy's completions, drawn nearer to a teacher.

With K completions y of each prompt from the policy, each step descends

    KL(pi || teacher) = E sum_t log(pi(y_t) / teacher(y_t)),    y from pi

where the teacher is the reference (`config.teacher`), by `reinforce` without a
reward and with a KL weight of 1: what multiplies grad log pi(y_t) is the
log-ratio summed from t on, less that of the prompt's other completions. No
reward is looked at. The estimate is unbiased for the KL of whole completions,
as that of MiniLLM (Gu et al., arXiv 2306.08543), whose tricks against its
variance are not here. On-policy GKD (Agarwal et al., arXiv 2306.13649, lambda =
1 with the reverse KL) leaves out what y_t does to the tokens after it, and so
does the log-ratio of y_t alone, which others run under this name ("On-Policy
Distillation", Thinking Machines Lab, 2025): less noise, another gradient.
"""

import jax.numpy as jnp

from bond_jax.algorithms import reinforce
from bond_jax.algorithms.parts import ops
from bond_jax.types import Algorithm, Scores


def make(*, num_policy: int) -> Algorithm:
  """Builds on-policy distillation.

  Args:
    num_policy: K, completions of the policy per prompt, 1 or more; with 1 the
      baseline is the other prompts'.

  A ValueError for any other.
  """
  if num_policy < 1:
    raise ValueError(f'num_policy must be 1 or more, got {num_policy}')
  gradient = reinforce.policy_gradient(
    num_policy=num_policy,
    kl_weight=1.0,
    reward=lambda scores: jnp.zeros_like(scores.reward),
    peers='prompt' if num_policy > 1 else 'batch',
    to_go=True,
  )

  def weigh(scores: Scores):
    rows, metrics = gradient.weigh(scores)
    differ = (scores.log_sampled != scores.log_reference).any((1, 2))
    fires = ops.weighted_mean(differ * 1.0, scores.weight)
    return rows, metrics | {'signal/fires': fires}

  return gradient._replace(weigh=weigh, needs_teacher=True)
