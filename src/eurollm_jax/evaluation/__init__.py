"""What a model is worth: bits per byte for each language, samples, and the report of a run."""
