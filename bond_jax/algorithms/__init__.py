"""How a Best-of-N policy is learned: one file per algorithm.

A file says how many completions it wants, which of them it trains on, how their
log-probs become a loss, and how the anchor moves. `parts/` is what several
share. Arrays in, arrays out: no model, no text, no config. Start at jbond.py.
"""
