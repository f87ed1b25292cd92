"""Engines past one GPU: what runs the passes of an encode on several GPUs and machines."""
