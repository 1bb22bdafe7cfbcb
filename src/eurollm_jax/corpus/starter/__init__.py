"""The corpus of the quick start: real text out of packages of the registry."""
