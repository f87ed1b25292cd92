"""Which files are one part of a checkpoint, and which tensors are in them?

What is decided here is fingerprinted (``fingerprint.py``) and loaded (``handed_over.py``, and what reads the files
itself), so that the two never differ. Files are chosen as diffusers and transformers choose them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from k5cache.shared.errors import ModelError
from k5cache.shared.plain import UnfitFile, open_plain, parse_json, read_json

_AGAIN = "Download the model again"
_CONFIG_OF = {
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
_INDEX = ".safetensors.index.json"
_SHARD = re.compile(r"[^./\\\0][^/\\\0]*\.safetensors")
_MOST_JSON_BYTES = 16 << 20  # of a header or an index; those of the published checkpoints have 0.1 MB
# The files of a tokenizer that decide ids. If there is a tokenizer.json, it has the vocabulary and the merges.
_TOKENIZER_FILES = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json")
_SLOW_TOKENIZER_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")
_VOCABULARIES = {"tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model"}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor is in a safetensors file: in the bytes ``[start, start + num_bytes)`` of ``path``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int


def config_name(part: str) -> str:
    """The name of the part's config."""
    return _CONFIG_OF.get(part, "config.json")


def has_weights(part: str) -> bool:
    """Whether a part has weights; tokenizers and the scheduler do not."""
    return part not in _CONFIG_OF


def library_name(part: str) -> str:
    """How the library calls the part's weights: ``model`` in transformers, ``diffusion_pytorch_model`` in diffusers."""
    return "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"


def weight_files(folder: Path, part: str) -> list[Path]:
    """The safetensors files that are the weights of a part, in the order of their names.

    Of a whole file beside an index, transformers loads the file and diffusers follows the index. If a part has neither
    under the name that the library expects, the only index counts, or else every file.

    Raises:
        ModelError: there is none; an index cannot be read, names a file outside the folder or one that is missing; or
            there are several indexes and nothing decides between them.
    """
    where = folder / part
    whole, index = (where / f"{library_name(part)}{ending}" for ending in (".safetensors", _INDEX))
    if whole.is_file() and (part.startswith("text_encoder") or not index.is_file()):
        return [whole]
    if index.is_file():
        return _named(index)
    indexes = sorted(path for path in where.glob(f"*{_INDEX}") if path.is_file())
    if len(indexes) > 1:
        names = " and ".join(path.name for path in indexes[:2])
        raise ModelError(f"{where} has {names}: which are its weights?", "Remove all but one of them")
    if indexes:
        return _named(indexes[0])
    files = sorted(path for path in where.glob("*.safetensors") if path.is_file())
    if not files:
        raise ModelError(f"{where} has no .safetensors file", f"{_AGAIN}, in the safetensors format")
    return files


def _named(index: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(read_json(index, _MOST_JSON_BYTES)["weight_map"].values()))
        if not names:
            raise ValueError("it names no file")
    except UnfitFile as error:
        raise ModelError(f"{index} cannot be read: {error.strerror}", _AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read as an index of weights: {str(error)[:80]}", _AGAIN) from error
    for name in names:
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise ModelError(f"{index} names {str(name)[:80]!r}, which is not a .safetensors file beside it", _AGAIN)
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise ModelError(f"{index.parent} lacks {', '.join(absent)}", _AGAIN)
    return [index.parent / name for name in names]


def tokenizer_files(folder: Path, part: str) -> list[Path]:
    """The files beside the config that decide a tokenizer's ids.

    Raises:
        ModelError: none of them has a vocabulary. transformers would make a tokenizer that knows no words.
    """
    where = folder / part
    slow = () if (where / "tokenizer.json").is_file() else _SLOW_TOKENIZER_FILES
    names = [name for name in (*_TOKENIZER_FILES, *slow) if (where / name).is_file()]
    if _VOCABULARIES.isdisjoint(names):
        raise ModelError(f"{where} has no vocabulary, such as tokenizer.json", _AGAIN)
    return [where / name for name in names]


def stored_tensors(folder: Path, part: str) -> list[StoredTensor]:
    """Every tensor of a part, in the order of their names.

    Raises:
        ModelError: as ``weight_files`` and ``read_header``, or two files have a tensor of the same name.
    """
    tensors = sorted((t for path in weight_files(folder, part) for t in read_header(path)), key=lambda t: t.name)
    for one, other in pairwise(tensors):
        if one.name == other.name:
            names = f"{one.path.name} and {other.path.name}"
            raise ModelError(f"{folder / part} has {one.name[:80]} twice, in {names}", _AGAIN)
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """Where every tensor of a safetensors file is. Such a file has 8 bytes of length, that much JSON, then the data.

    Raises:
        ModelError: it is not a safetensors file, or it ends before its last tensor.
    """
    try:
        with open_plain(path) as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            if length > _MOST_JSON_BYTES:
                raise ValueError("its header is too long")
            header = parse_json(file.read(min(length, size)))
        header.pop("__metadata__", None)
        tensors = [_stored(name, entry, path, 8 + length) for name, entry in header.items()]
    except UnfitFile as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", _AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a safetensors file", _AGAIN) from error
    end = max((t.start + t.num_bytes for t in tensors), default=0)
    if end > size:
        raise ModelError(f"{path} is cut short: {size:,} of {end:,} bytes", _AGAIN)
    return tensors


def _stored(name: str, entry: dict[str, Any], path: Path, data: int) -> StoredTensor:
    """One entry of a header.

    Raises:
        ValueError, KeyError, TypeError: it is not such an entry.
    """
    start, end = entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (start, end - start, *entry["shape"])):
        raise ValueError(f"{name} has a negative place or shape")
    return StoredTensor(name, str(entry["dtype"]), tuple(entry["shape"]), path, data + start, end - start)
