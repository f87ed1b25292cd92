"""Recipes, composed from answers; those in ``pipelines/`` are written by this."""
