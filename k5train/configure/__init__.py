"""Questions whose answers become a recipe: ``k5train configure``."""
