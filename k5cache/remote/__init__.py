"""Caches and sources in object stores, through fsspec. Nothing of it is imported unless a URL is named."""
