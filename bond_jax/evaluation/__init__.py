"""Is one sample of the policy worth N of the reference?

evaluate.py draws and judges completions of held-out prompts, sweep.py compares
runs, sample.py talks to one, report/ writes the page. Start at evaluate.py.
"""
