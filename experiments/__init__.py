"""Sizes, mixtures and questions: what is chosen, beside the library that carries it out."""
