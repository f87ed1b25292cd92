"""Rows of caches to batches, each a function of the seed and the step."""
