"""One step of distillation, and the loops around it.

step.py is the step: sample, reward, select, score, update, move the anchor.
distil.py runs it, text_task.py and enumerable.py give it prompts and rewards,
sft.py makes the reference. Start at step.py.
"""
