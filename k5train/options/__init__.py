"""The options of stage 2, one file a table of the recipe."""
