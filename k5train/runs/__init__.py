"""What a run has on disk: its folder, its resume state, its metrics and trackers."""
