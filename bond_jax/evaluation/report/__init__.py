"""The page and the figures of an evaluation.

page.py puts them together; cautions.py says what a number cannot bear.
Start at page.py.
"""
