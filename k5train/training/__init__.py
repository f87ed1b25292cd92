"""One run from its command to its LoRA, and many of them on one base."""
