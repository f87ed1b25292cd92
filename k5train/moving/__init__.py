"""How does the setup of another trainer become a recipe? One file for each trainer, and one for the recipe."""
