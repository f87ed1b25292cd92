"""What is done with a finished cache: check, draw, add prompts, merge, and delete what is not needed."""
