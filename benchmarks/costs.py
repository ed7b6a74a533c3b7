"""What a step of every algorithm of a config costs, from the config alone.

    PYTHONPATH=. python benchmarks/costs.py

Prints a table for the algorithms of configs/demo.py; the same numbers of one
run are in its train/summary.json, under `cost`. Nothing is run.
"""

from bond_jax.models import policies
from bond_jax.training import costs, setups
from configs import demo


def main():
  for i, name in enumerate(demo.ALGORITHMS):
    config = demo.get_config(f'algorithm={name}')
    vocab_size = policies.make_sizes(config.model, 1).vocab_size
    algorithm = setups.make_algorithm(config)
    head, *rows = costs.table(
      {name: costs.of_config(config, algorithm, vocab_size)}
    )
    if not i:
      print('| ' + ' | '.join(head) + ' |')
      print('|' + '---|' * len(head))
    for name, *values in rows:
      print('| ' + ' | '.join([name, *(f'{x:.4g}' for x in values)]) + ' |')


if __name__ == '__main__':
  main()
