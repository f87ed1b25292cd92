"""How does a library load exactly the files of a part that were fingerprinted? It is given a folder with no others.

``from_pretrained`` decides by itself what it loads: of several weight files one, an adapter beside them, another
vocabulary that a config names. In a folder of links to the files that ``part_files`` decides on there is no choice.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from k5cache.shared import system
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import ModelError
from k5cache.shared.part_files import (
    config_name,
    has_weights,
    library_name,
    read_header,
    tokenizer_files,
    weight_files,
)


@contextmanager
def handed_over(folder: Path, part: str, inside: Path | None = None) -> Iterator[Path]:
    """``with handed_over(folder, "vae") as only: AutoencoderKL.from_pretrained(only)``.

    Args:
        inside: a folder of the caller in which the links stay after the block, for a library that opens files later.

    Yields:
        a temporary folder of links to the config and to the weights or vocabulary of the part. What is mapped from it
        may be used after the block.

    Raises:
        ModelError: a file is missing, or the library cannot load the part; in its own words.
    """
    with ExitStack() as stack:
        temporary = stack.enter_context(_temporary()) if inside is None else tempfile.mkdtemp(prefix="k5-", dir=inside)
        only = Path(temporary)
        _link(folder, part, only)
        try:
            yield only
        except (OSError, ValueError, RuntimeError, LookupError, TypeError) as error:
            is_of_the_machine = getattr(error, "errno", None) is not None or type(error).__name__ == "OutOfMemoryError"
            if is_of_the_machine:
                raise
            words = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise ModelError(
                f"{folder / part} cannot be loaded: {words.replace(temporary, str(folder / part))}",
                "Download the model again",
            ) from error


def _temporary() -> tempfile.TemporaryDirectory[str]:
    # Windows does not delete what is mapped; its own cleaning of temporary files does that later.
    return tempfile.TemporaryDirectory(prefix="k5-", ignore_cleanup_errors=os.name == "nt")


def _link(folder: Path, part: str, only: Path) -> None:
    config = folder / part / config_name(part)
    if not config.is_file():
        raise ModelError(f"{folder} lacks {part}/{config.name}", "Download the model again")
    files = {config.name: config}
    if has_weights(part):
        files |= _weights(folder, part, only)
    elif part.startswith("tokenizer"):
        files |= {path.name: path for path in tokenizer_files(folder, part)}
        document = read_config(folder, part)
        kept = {key: value for key, value in document.items() if not key.endswith(("_file", "_files"))}
        if kept != document:  # it names other files, which would be loaded instead
            del files[config.name]
            (only / config.name).write_text(json.dumps(kept), encoding="utf-8")
    for link, path in files.items():
        system.stand_in(only / link, path.resolve())


def _weights(folder: Path, part: str, only: Path) -> dict[str, Path]:
    """The weight files under the names that the library expects. If there are several, writes their index."""
    paths, name = weight_files(folder, part), library_name(part)
    if len(paths) == 1:
        return {f"{name}.safetensors": paths[0]}
    shards = {f"{name}-{i:05d}-of-{len(paths):05d}.safetensors": path for i, path in enumerate(paths, 1)}
    weight_map = {tensor.name: shard for shard, path in shards.items() for tensor in read_header(path)}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in paths)}, "weight_map": weight_map}
    (only / f"{name}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return shards
