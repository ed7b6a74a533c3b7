"""A language model as pure functions of its parameters.

Gemma (gemma/), any model of the gemma library (library.py), LoRA, a scalar
head; and what all of them do: sampling.py draws, log_probs.py scores, stops.py
ends a completion. policies.py makes one from its settings. Start at sampling.py
and log_probs.py.
"""
