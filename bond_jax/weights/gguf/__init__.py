"""Gemma in GGUF, the format of llama.cpp and Ollama, in and out.

The tensors and settings of Hugging Face under other names: layout.py maps them,
reader.py and writer.py move the numbers. Start at reader.py.
"""
