"""Proof on the user's machine: our step beside diffusers', and what int8 costs."""
