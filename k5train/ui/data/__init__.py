"""The view of data: what lies under ``datasets/`` and ``cache/``, as it will be trained on."""
