"""The life of a run: flags, config, lock, checkpoints, log, an end on request.

A stage is begun by stages.py, once, by all hosts, in a folder that is its own;
checkpoints/ keeps its state, provenance.py what it was made from. What a stage
computes is not known here. Start at stages.py.
"""
