"""What is trained on: prompts, a reward, and a probe of the policy.

text_task.py has rows of text, enumerable.py a language in which every law is
exact, task.py what both give to the loop.

Start at task.py.
"""
