"""Text <-> token ids without loss, and what a tokenizer costs each language."""
