"""What only developers measure. Run from a checkout, on a machine with a GPU: ``python -m pipelines.measure.NAME``."""

import os

# As the command line of k5train sets it, and for the same reason. torch reads it when it is imported.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
