"""From images and captions to shards: what is asked for, what is new, and the encoders' passes over it."""
