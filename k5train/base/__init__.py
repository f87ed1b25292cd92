"""The frozen int8 transformer: its linears, how it is quantised, and its file on disk."""
