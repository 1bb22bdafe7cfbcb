"""Text -> token store. Nothing here imports jax: it runs on login nodes and in loader workers."""
