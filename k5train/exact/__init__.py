"""Does this machine compute what diffusers computes? The selftest of stage 2."""
