"""The page over datasets, caches and runs: ``k5train ui``, and the views that ``k5train report`` writes to a file."""
