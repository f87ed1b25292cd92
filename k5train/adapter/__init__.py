"""The adapter: where it is attached, its files, and who loads them."""
