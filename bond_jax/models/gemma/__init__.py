"""Gemma 1, 2 and 3, over the official stacked parameters.

configs.py has the sizes, layers.py the parts, decoder.py one token after
another, model.py the forward pass. Start at model.py.
"""
