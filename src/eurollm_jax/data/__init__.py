"""Token store -> Batch: which row of which source stands at which place of the run. Nothing here imports jax."""
