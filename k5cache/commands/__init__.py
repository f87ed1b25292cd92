"""What the other commands do: look into a cache, check it, put it together, clean it up."""
