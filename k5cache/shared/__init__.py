"""What both stages use: errors, console, recipes, models and files."""
