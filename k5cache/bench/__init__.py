"""Measurements of stage 1 with random weights and rows, beside what others do. Nothing is downloaded."""
