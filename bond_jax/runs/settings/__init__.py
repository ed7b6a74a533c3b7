"""The settings of a run.

defaults.py has every one with its default and range, fields.py the rules and
their check, configs.py the config that a run's folder keeps.

Start at defaults.py.
"""
