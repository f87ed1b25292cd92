"""One run: start, loop, step, validation, resume."""
