"""How much may come in at once?"""

from __future__ import annotations

MOST_FILES = 1000
MOST_BYTES = 4 << 30
"""Of all files together."""
MOST_BYTES_A_FILE = 512 << 20
MOST_PIXELS = 250_000_000
"""Of one picture; the largest photographs have about so many. More can be put into the folder by hand."""
