"""The stage that trains a reward.

ridge_fit.py fits n-grams to ratings, train.py a Gemma with a scalar head to
preferences; report.py measures the latter on held-out texts. Start at stage.py.
"""
