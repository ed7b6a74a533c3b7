"""One step of distillation, and the loops around it.

step.py is the step: sample, reward, select, score, update, move the anchor.
distil.py runs it over and over in loop.py, for what tasks/ gives it; sft.py
makes the reference. Start at step.py.
"""
