"""Training and evaluation data: text, splits, tokenizers, associative recall, baselines."""
