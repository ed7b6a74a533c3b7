"""What a run starts from, and what it leaves for others.

official.py, huggingface/ and gguf/ have the layouts of others; load.py gives a
stage its policy, tokenizer and reference; export.py writes. Start at load.py.
"""
