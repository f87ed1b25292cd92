"""What each block keeps, recomputes or streams in the VRAM there is."""
