"""Weights and tokenizers in Hugging Face format, and the proof that they are the same model."""
