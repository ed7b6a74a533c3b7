"""Rows of text, and the pieces, prompts and pairs that they become.

readers.py opens files and data sets, conversations.py knows what fields mean,
sources.py gives rows by their index, and mixes them; tokenizer.py makes pieces
of text. examples.py makes batches of prompts and answers, preferences.py of
pairs; movie_reviews.py fetches the demo's data. Start at sources.py.
"""
