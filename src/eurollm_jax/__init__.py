"""Pre-training of multilingual language models with JAX: exact mixtures, exact resume, exact exports."""

__version__ = "0.1.0"
