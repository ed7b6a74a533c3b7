"""What a step of every algorithm of a config costs, from the config alone.

    PYTHONPATH=. python benchmarks/costs.py

Prints a table for the algorithms of configs/demo.py; the rows and tokens of one
run are in its train/summary.json, under `cost`. Nothing is run.
"""

from bond_jax.models import policies
from bond_jax.sizing import operations
from bond_jax.training import costs, setups
from configs import demo


def main():
  names = [x.replace('_', ' ') for x in costs.Cost._fields]
  head = ['per prompt and update', *names, 'flops']
  print('| ' + ' | '.join(head) + ' |')
  print('|' + '---|' * len(head))
  for name in demo.ALGORITHMS:
    config = demo.get_config(f'algorithm={name}')
    sizes = policies.make_sizes(config.model, 1)
    algorithm = setups.make_algorithm(config)
    phases = operations.of_config(config, algorithm, sizes)
    flops = sum(phase.flops for phase in phases.values())
    values = [*costs.of_config(config, algorithm), flops]
    print('| ' + ' | '.join([name, *(f'{x:.4g}' for x in values)]) + ' |')


if __name__ == '__main__':
  main()
