"""The stage that trains a reward, and what judges it.

ridge_fit.py fits n-grams to ratings, train.py a Gemma with a scalar head to
what people prefer; report.py says how good either is on texts that it has not
seen. Start at stage.py.
"""
