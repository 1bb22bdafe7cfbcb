"""The model card of an export."""

from eurollm_jax.hf.card.page import model_card

__all__ = ["model_card"]
