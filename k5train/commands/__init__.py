"""The commands of stage 2. A command parses, calls one function and prints its result."""
