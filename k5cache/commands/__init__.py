"""The commands of stage 1. A command parses, calls one function and prints its result."""
