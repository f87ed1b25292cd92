"""Write the packaged recipes: ``python -m k5train.recipes.write FOLDER``, after a value or a sentence has changed."""

from __future__ import annotations

import sys
from pathlib import Path

from k5train.recipes.listed import PACKAGED


def write_all(folder: Path) -> None:
    """Write each recipe into a folder."""
    for name, recipe in PACKAGED.items():
        (folder / f"{name}.toml").write_text(recipe.text, encoding="utf-8")


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
