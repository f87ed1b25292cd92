"""Training steps of a full-size transformer, timed beside what others do."""
