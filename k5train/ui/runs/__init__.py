"""The views of runs: one run, the list of them, comparisons, sweeps, and reports in one file."""
