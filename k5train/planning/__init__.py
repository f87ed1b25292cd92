"""Which plan fits: what each block keeps, recomputes or streams in the VRAM that there is."""
