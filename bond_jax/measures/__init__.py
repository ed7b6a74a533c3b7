"""Measures of distributions and of samples, in NumPy float64.

Exact tables (tables.py, exact.py), the Best-of-N curve of a task (curves.py),
win rates and their intervals (comparisons.py), and the numbers of an evaluation
(aggregate.py). No JAX and nothing else of ours. Start at curves.py.
"""
