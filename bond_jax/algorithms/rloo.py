"""RLOO: REINFORCE with a baseline from the same prompt's other completions.

Ahmadian et al., "Back to Basics" (arXiv 2402.14740). With K completions of
each prompt from the policy, each step ascends E[r(y)] - c KL(pi || ref) along

    mean_i grad log pi(y_i) (R_i - mean_{j != i} R_j)
    R_i = r(y_i) - c log(pi(y_i) / ref(y_i))

where c is `kl_weight`. BOND's figures compare with it at K = 2
(arXiv 2407.14622). The rest is `reinforce`'s. A prompt whose rewards are all
tied leaves the pull to the reference alone.
"""

from bond_jax.algorithms import reinforce
from bond_jax.types import Algorithm


def make(*, num_policy: int, kl_weight: float) -> Algorithm:
  """Builds RLOO.

  Args:
    num_policy: K, completions of the policy per prompt, 2 or more.
    kl_weight: >= 0, nats of KL weigh this much reward each.

  A ValueError for any other.
  """
  if num_policy < 2:
    raise ValueError(
      f'num_policy must be 2 or more, got {num_policy}: the baseline is the'
      " prompt's other completions; with one per prompt use reinforce"
    )
  return reinforce.policy_gradient(num_policy=num_policy, kl_weight=kl_weight)
