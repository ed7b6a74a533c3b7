"""The mesh, what lies where on it, and several hosts.

sharding.py has a rule for every parameter; hosts.py joins hosts and keeps them
in agreement; shares.py says whose rows are whose. Start at sharding.py.
"""
