"""The cache on disk, format 1: stdlib and pyarrow, no torch at import."""
