"""A new run: what it starts from, its recipe as a form and as text, what is wrong with it, its plan, and its start."""
