"""The state of a stage on disk: whole, checked, and never lost.

checkpoint.py keeps states by Orbax, checksums.py finds damaged ones, saving.py
is what a loop calls.

Start at saving.py.
"""
