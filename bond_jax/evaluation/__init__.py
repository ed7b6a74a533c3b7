"""The last stage: is one sample of the policy worth N of the reference?

evaluate.py draws and judges completions of held-out prompts, sweep.py compares
runs, sample.py draws from one, report/ writes the page. Start at evaluate.py.
"""
