"""The page and the figures of an evaluation.

page.py fills the template page.html; cautions.py has the warnings.
Start at page.py.
"""
