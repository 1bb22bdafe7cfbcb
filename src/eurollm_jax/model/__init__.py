"""Batch -> loss: the decoder as pure functions over a tree of declared parameters."""
