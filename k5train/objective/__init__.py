"""What a step is trained towards: flow matching, TREAD and rollout, as pure functions."""
