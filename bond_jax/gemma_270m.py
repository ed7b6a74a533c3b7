"""Fetches the weights of Gemma 3 270M, once; the Gemma Terms of Use apply.

python -m bond_jax.gemma_270m --data_dir=data --accept_gemma_terms
"""

from bond_jax.weights import gemma_270m

if __name__ == '__main__':
  gemma_270m.run(__doc__)
