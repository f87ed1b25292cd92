"""Which files are one part of a checkpoint, and which tensors are in them?

What is decided here is fingerprinted (``fingerprint.py``) and loaded (``handed_over.py``, and what reads the files
itself), so that the two never differ. Files are chosen as diffusers and transformers choose them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
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
VISION_PREFIXES = ("visual.", "model.visual.")
"""Where the vision tower of a text encoder is: as published, and as newer libraries save it."""
_LM_HEAD = re.compile(r"(\w+\.)*lm_head\.\w+")


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


def is_used(tensor: str, part: str, with_vision: bool) -> bool:
    """Whether a tensor decides anything in a cache. Of the text encoder the lm_head does not, nor for text-to-image
    the vision tower: the pipelines take hidden states, and only image-to-image shows Qwen a picture."""
    if part != "text_encoder":
        return True
    return not (_LM_HEAD.fullmatch(tensor) or (not with_vision and tensor.startswith(VISION_PREFIXES)))


def used_shards(weight_map: Mapping[str, str], part: str, with_vision: bool) -> list[str]:
    """The files of an index that hold a tensor that is used. Published, one shard of Qwen is the lm_head alone."""
    return sorted({file for tensor, file in weight_map.items() if is_used(tensor, part, with_vision)})


def weight_files(folder: Path, part: str, with_vision: bool = False) -> list[Path]:
    """The safetensors files that are the weights of a part, in the order of their names.

    A file that an index names may be absent if nothing in it is used. Of a whole file beside an index, transformers
    loads the file and diffusers follows the index. If a part has neither under the name that the library expects, the
    only index counts, or else every file.

    Raises:
        ModelError: there is none; an index cannot be read, names a file outside the folder or one that is missing; or
            there are several indexes and nothing decides between them.
    """
    where = folder / part
    whole, index = (where / f"{library_name(part)}{ending}" for ending in (".safetensors", _INDEX))
    if whole.is_file() and (part.startswith("text_encoder") or not index.is_file()):
        return [whole]
    if index.is_file():
        return _named(index, part, with_vision)
    indexes = sorted(path for path in where.glob(f"*{_INDEX}") if path.is_file())
    if len(indexes) > 1:
        names = " and ".join(path.name for path in indexes[:2])
        raise ModelError(f"{where} has {names}: which are its weights?", "Remove all but one of them")
    if indexes:
        return _named(indexes[0], part, with_vision)
    files = sorted(path for path in where.glob("*.safetensors") if path.is_file())
    if not files:
        raise ModelError(f"{where} has no .safetensors file", f"{_AGAIN}, in the safetensors format")
    return files


def _named(index: Path, part: str, with_vision: bool) -> list[Path]:
    """The files that an index names and that are here."""
    weight_map = read_index(index)
    used = used_shards(weight_map, part, with_vision)
    if absent := [name for name in used if not (index.parent / name).is_file()]:
        raise ModelError(f"{index.parent} lacks {', '.join(absent)}", _AGAIN)
    return [index.parent / name for name in sorted({*weight_map.values()}) if (index.parent / name).is_file()]


def read_index(index: Path) -> dict[str, str]:
    """Which file has which tensor: the ``weight_map`` of an index.

    Raises:
        ModelError: it cannot be read, or names what is not a safetensors file beside it.
    """
    try:
        weight_map: dict[str, str] = dict(read_json(index, _MOST_JSON_BYTES)["weight_map"])
        names = sorted({*weight_map.values()})
        if not names:
            raise ValueError("it names no file")
    except UnfitFile as error:
        raise ModelError(f"{index} cannot be read: {error.strerror}", _AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read as an index of weights: {str(error)[:80]}", _AGAIN) from error
    for name in names:
        if not (isinstance(name, str) and _SHARD.fullmatch(name)):
            raise ModelError(f"{index} names {str(name)[:80]!r}, which is not a .safetensors file beside it", _AGAIN)
    return weight_map


def small_files(names: Collection[str], part: str) -> list[str]:
    """The files of a part that decide which weights are fetched: its config and the index of its weights.

    Args:
        names: of all files of a repository.
    """
    indexes = [f"{part}/{library_name(part)}{_INDEX}"] if has_weights(part) else []
    if not any(name in names for name in indexes):
        indexes = [name for name in _beside(names, part) if name.endswith(_INDEX)] if has_weights(part) else []
    return [name for name in (f"{part}/{config_name(part)}", *indexes) if name in names]


def needed_files(names: Collection[str], part: str, folder: Path, with_vision: bool) -> list[str]:
    """Every file of a part that is used, chosen as ``weight_files`` and ``tokenizer_files`` choose.

    Args:
        names: of all files of a repository.
        folder: has the ``small_files`` of it.

    Raises:
        ModelError: an index cannot be read.
    """
    config, *indexes = small_files(names, part) or [f"{part}/{config_name(part)}"]
    there = _beside(names, part)
    if part.startswith("tokenizer"):
        slow = () if f"{part}/tokenizer.json" in names else _SLOW_TOKENIZER_FILES
        return [config, *(f"{part}/{name}" for name in (*_TOKENIZER_FILES, *slow) if f"{part}/{name}" in names)]
    if not has_weights(part):
        return [config]
    whole = f"{part}/{library_name(part)}.safetensors"
    if whole in names and (part.startswith("text_encoder") or f"{part}/{library_name(part)}{_INDEX}" not in names):
        return [config, whole]
    if len(indexes) == 1 and (folder / indexes[0]).is_file():
        shards = used_shards(read_index(folder / indexes[0]), part, with_vision)
        return [config, *indexes, *(f"{part}/{name}" for name in shards)]
    return [config, *indexes, *(name for name in there if name.endswith(".safetensors"))]


def _beside(names: Collection[str], part: str) -> list[str]:
    return sorted(name for name in names if re.fullmatch(rf"{part}/[^/]+", name))


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


def stored_tensors(folder: Path, part: str, with_vision: bool = False, unused: bool = False) -> list[StoredTensor]:
    """Every tensor of a part that is used, in the order of their names; with ``unused``, every tensor that is here.

    Raises:
        ModelError: as ``weight_files`` and ``read_header``, or two files have a tensor of the same name.
    """
    files = weight_files(folder, part, with_vision)
    tensors = sorted((t for path in files for t in read_header(path)), key=lambda t: t.name)
    for one, other in pairwise(tensors):
        if one.name == other.name:
            names = f"{one.path.name} and {other.path.name}"
            raise ModelError(f"{folder / part} has {one.name[:80]} twice, in {names}", _AGAIN)
    return [tensor for tensor in tensors if unused or is_used(tensor.name, part, with_vision)]


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
