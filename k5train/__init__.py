"""k5train: a cache of latents and text embeddings in, a LoRA for Kandinsky 5.0 Image out."""
