"""Whether what is cached is what diffusers computes, and what the encoders still give."""
