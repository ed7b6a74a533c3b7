"""Gemma in the Hugging Face layout, in and out.

config_json.py reads their settings, layout.py maps their names, reader.py and
writer.py move the arrays, adapter.py LoRA as peft keeps it. Start at reader.py.
"""
