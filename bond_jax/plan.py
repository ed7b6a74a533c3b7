"""What a run needs of a slice, from its compiler, before anything is rented.

    python -m bond_jax.plan --config=configs/gemma_7b_jbond.py \
      --topology=v5e:4x4 --out=runs/plan

compiles every program of a step, and the probe, for those chips, which need not
be attached, and says whether each fits, with all that lives beside it; what
it computes, reads and sends; and the least time that these take.
"""

from bond_jax.sizing import plan

if __name__ == '__main__':
  plan.run(__doc__)
