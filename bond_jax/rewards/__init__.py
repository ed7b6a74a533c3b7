"""Functions from text to numbers, and how they are called.

A reward is any function of prompts, completions and a context; make.py makes it
from a config, calling.py calls it, checks what it returns and survives what it
raises. The others are rewards and judges to use. Start at text.py.
"""
