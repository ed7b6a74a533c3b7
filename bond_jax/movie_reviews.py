"""Fetches the demo's data, once.

`python -m bond_jax.movie_reviews --data_dir=data` leaves it in data/.
"""

from bond_jax.data import movie_reviews

if __name__ == '__main__':
  movie_reviews.run()
