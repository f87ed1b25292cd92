"""How is an adapter added to the weights of its base? Tensor by tensor into a new checkpoint in the diffusers layout.

A checkpoint can hold what no LoRA can: a DoRA's rows and a LoKr's products. Files are written whole, in a fixed order,
and the config that makes the folder a checkpoint comes last. A merge that was stopped goes on at the next file.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from k5cache.shared.checkpoint import ENCODER_PARTS
from k5cache.shared.console import human_bytes
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import ModelError, OutputError, RunError
from k5cache.shared.files import TEMPORARY, make_folder, new_file
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.outputs import MERGED, MERGED_FILE, check_folder, check_writable
from k5cache.shared.part_files import StoredTensor, has_weights, read_header, weight_files
from k5cache.shared.sealed import Changed, Digest, seal, unseal
from k5train.adapter.changes import Adapter, check_tensors, open_adapter
from k5train.adapter.checks import check_weights
from k5train.adapter.other_kinds import check_base
from k5train.adapter.targets import linear_sizes
from k5train.base.quantize import empty_transformer

_STEM = "diffusion_pytorch_model"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _FLOATS.items()}
_LINKED_FROM = 16 << 20  # bytes from which a file of another part is linked instead of copied; configs may be edited
_SMALL = frozenset({".json", ".txt", ".model", ".jinja"})
_PART = re.compile(r"[a-z]\w*", re.ASCII)  # in model_index.json, whose other keys begin with an underscore
_CHUNK = 8 << 20
_DOWNLOAD = "Download the model again, or give another folder with --into-base"


@dataclass(frozen=True)
class Merged:
    """A checkpoint that was written."""

    num_modules: int
    num_bytes: int
    """Of the transformer."""
    lost: float
    """How far the weights are from the exact sums because of their number format, as a share of the adapters' change:
    the root of the mean squares of both. 0: nothing."""
    parts: tuple[str, ...]
    """What is beside the transformer: linked or copied from the base."""
    is_pipeline: bool
    """Whether it has a model_index.json, for ``from_pretrained`` of the pipeline."""
    left_out: tuple[str, ...]
    """Keys of text encoders in the adapters' files."""
    other_base: tuple[Path, ...]
    """Adapters that were trained on another transformer."""
    was_there: bool = False
    """It was finished before, and nothing was written."""


@dataclass(frozen=True)
class _Shard:
    """One file of the new transformer."""

    name: str
    tensors: tuple[StoredTensor, ...]
    """Of the base, in the order in which they are written."""


def merge_into_base(
    sources: Sequence[Path], weights: Sequence[float], base: Path, out: Path,
    dtype: torch.dtype | None = None, progress: Callable[[int, int], object] = lambda done, total: None,
) -> Merged:  # fmt: skip
    """Write a checkpoint whose transformer has the changes of the adapters in its weights, each at its strength.

    Every weight is the base's plus the sum of the changes, each relative to the base, as when the files are loaded
    beside each other. Sums are in float32 and rounded once. All other tensors keep their bytes.

    Args:
        base: a checkpoint in the diffusers layout, with its transformer. Whatever other parts it has are linked or
            copied.
        out: a new folder, or one in which the same merge was stopped.
        dtype: of every tensor. None: as in the base.
        progress: called with the number of tensors that are done and the number of all.

    Raises:
        OutputError: ``out`` cannot be written, is something else, or the disk has too little room.
        RunError: a file cannot be read as an adapter of this model, ``out`` is another merge, or a value does not fit.
        ModelError: the base is incomplete or damaged.
    """
    check_folder(out, MERGED, reads=[base])
    check_writable(out)
    check_weights(len(sources), weights)
    transformer = empty_transformer(base)
    sizes = linear_sizes(transformer)
    shards = _shards(base, {name: tuple(t.shape) for name, t in transformer.state_dict().items()}, dtype)
    adapters = [open_adapter(path, sizes, weight) for path, weight in zip(sources, weights, strict=True)]
    mark = fingerprint(base, "transformer")
    for adapter in adapters:
        if adapter.kind == "dora":
            check_base(adapter.path, adapter.metadata, mark, base)
        check_tensors(adapter)
    identity = _identity(adapters, mark, dtype)
    was_there = _begin(out, identity) and all(_is_written(out / "transformer" / s.name, s, dtype) for s in shards)
    num_bytes = sum(_num_bytes(t, dtype) for shard in shards for t in shard.tensors)
    report = Merged(
        num_modules=len({module for adapter in adapters for module in adapter.keys}),
        num_bytes=num_bytes,
        lost=0.0,
        parts=tuple(_others(base)),
        is_pipeline=(base / "model_index.json").is_file(),
        left_out=tuple(key for adapter in adapters for key in adapter.left_out),
        other_base=tuple(a.path for a in adapters if a.metadata.get("k5.base_fingerprint") not in (None, mark)),
        was_there=was_there,
    )
    if was_there:
        return report
    _check_room(out, base, shards, dtype)
    rounding = _Rounding()
    _write_transformer(out / "transformer", shards, adapters, dtype, rounding, progress)
    for part, files in _others(base).items():
        for file in files:
            _link_or_copy(file, out / part / file.name)
    _finish(out, base, shards, dtype)
    return replace(report, lost=rounding.share)


def _shards(base: Path, expected: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None) -> list[_Shard]:
    """The files to write: as many as the base has, under diffusers' names.

    Raises:
        ModelError: a tensor is missing, unexpected, misshapen, there twice or not of floats.
    """
    files = weight_files(base, "transformer")
    many = len(files)
    shards, there = [], {}
    for number, file in enumerate(files, 1):
        name = f"{_STEM}.safetensors" if many == 1 else f"{_STEM}-{number:05d}-of-{many:05d}.safetensors"
        tensors = sorted(read_header(file), key=lambda tensor: tensor.start)
        for tensor in tensors:
            if expected.get(tensor.name) != tensor.shape or tensor.name in there or tensor.dtype not in _FLOATS:
                problem = f"has {tensor.name} as {tensor.dtype} {list(tensor.shape)}"
                raise ModelError(f"{file} {problem}, which is not a weight of this model in 16 or 32 bits", _DOWNLOAD)
            there[tensor.name] = tensor
        shards.append(_Shard(name, tuple(tensors)))
    if missing := sorted(expected.keys() - there.keys()):
        raise ModelError(f"{base / 'transformer'} lacks {missing[0]}", _DOWNLOAD)
    return shards


def _identity(adapters: Sequence[Adapter], mark: str, dtype: torch.dtype | None) -> dict[str, Any]:
    """What decides every number of the new transformer."""
    merged = [
        {"name": adapter.path.name, "weight": adapter.strength, **asdict(Digest.of(adapter.path))}
        for adapter in adapters
    ]
    return {"format": 1, "base": mark, "merged": merged, "dtype": str(dtype or "as in the base").removeprefix("torch.")}


def _begin(out: Path, identity: Mapping[str, Any]) -> bool:
    """Mark the folder as this merge's; return whether it is finished.

    Raises:
        RunError: it is another merge.
    """
    path = out / MERGED_FILE
    if path.is_file():
        try:
            is_same = unseal(path.read_bytes()) == {**identity}
        except (Changed, ValueError):
            is_same = False
        if not is_same and any(out.glob("*/*")):
            raise RunError(
                f"{out} is a merged checkpoint of other files, of another base or at other strengths",
                "Give another folder with -o",
            )
        for left in (*out.glob(f"{TEMPORARY}*"), *out.glob(f"*/{TEMPORARY}*")):
            left.unlink(missing_ok=True)
        if is_same:
            return (out / "transformer" / "config.json").is_file()
    make_folder(out)
    with new_file(path) as file:
        file.write(seal(identity))
    return False


def _write_transformer(
    folder: Path, shards: Sequence[_Shard], adapters: Sequence[Adapter], dtype: torch.dtype | None,
    rounding: _Rounding, progress: Callable[[int, int], object],
) -> None:  # fmt: skip
    total, done = sum(len(shard.tensors) for shard in shards), 0
    make_folder(folder)
    for shard in shards:
        path = folder / shard.name
        if _is_written(path, shard, dtype):
            done += len(shard.tensors)
            continue
        with new_file(path) as file:
            file.write(_header(shard, dtype))
            for tensor in shard.tensors:
                file.write(_data(tensor, adapters, dtype, rounding))
                done += 1
                progress(done, total)


def _header(shard: _Shard, dtype: torch.dtype | None) -> bytes:
    """The beginning of a safetensors file: 8 bytes of length, then JSON."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard.tensors:
        end = start + _num_bytes(tensor, dtype)
        name = tensor.dtype if dtype is None else _NAMES[dtype]
        header[tensor.name] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _is_written(path: Path, shard: _Shard, dtype: torch.dtype | None) -> bool:
    """Whether a file is what it would become. It appeared whole, but a copy of the folder may have cut it short."""
    num_bytes = len(_header(shard, dtype)) + sum(_num_bytes(tensor, dtype) for tensor in shard.tensors)
    return path.is_file() and path.stat().st_size == num_bytes


def _num_bytes(tensor: StoredTensor, dtype: torch.dtype | None) -> int:
    return tensor.num_bytes if dtype is None else math.prod(tensor.shape) * dtype.itemsize


def _data(stored: StoredTensor, adapters: Sequence[Adapter], dtype: torch.dtype | None, rounding: _Rounding) -> Any:
    """The bytes of one tensor of the new transformer."""
    module, _, leaf = stored.name.rpartition(".")
    changing = [adapter for adapter in adapters if module in adapter.keys] if leaf == "weight" else []
    target = dtype or _FLOATS[stored.dtype]
    raw = bytearray(stored.num_bytes)
    _read_into(stored, raw)
    if not changing and target == _FLOATS[stored.dtype]:
        return raw
    exact = torch.frombuffer(raw, dtype=_FLOATS[stored.dtype]).reshape(stored.shape).float()
    change = sum((adapter.change(module, exact) for adapter in changing), torch.zeros(()))
    exact = exact + change if changing else exact
    rounded = exact.to(target)
    if not math.isfinite(rounded.abs().max().item()):
        raise RunError(
            f"{stored.name} would have a value that {str(target).removeprefix('torch.')} does not hold",
            "Use smaller strengths with --weight, or a wider --dtype",
        )
    if changing:
        rounding.add(rounded, exact, change)
    return rounded.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_into(stored: StoredTensor, raw: bytearray) -> None:
    with named(stored.path), stored.path.open("rb", buffering=0) as file:
        file.seek(stored.start)
        view, done = memoryview(raw), 0
        while done < len(raw):
            count = file.readinto(view[done:])
            if not count:
                raise ModelError(f"{stored.path} is cut short", _DOWNLOAD)
            done += count


class _Rounding:
    """What the number format of the weights loses of the adapters' change."""

    def __init__(self) -> None:
        self._lost = self._change = 0.0

    def add(self, rounded: Tensor, exact: Tensor, change: Tensor) -> None:
        """Count one weight."""
        self._lost += _norm(rounded.float() - exact) ** 2
        self._change += _norm(change) ** 2

    @property
    def share(self) -> float:
        """The root of the squares of what was lost, as a share of that of the change."""
        return math.sqrt(self._lost / self._change) if self._change else 0.0


def _norm(values: Tensor) -> float:
    """The root of the sum of squares; in float32 the square of 1e20 is infinite."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64))


def _others(base: Path) -> dict[str, list[Path]]:
    """The files of the parts beside the transformer: weights as they are loaded, and what is beside them in JSON and
    text."""
    index = base / "model_index.json"
    names = ["scheduler", *ENCODER_PARTS]
    if index.is_file():
        with named(index):
            names += [
                n for n in json.loads(index.read_text(encoding="utf-8")) if not n.startswith("_") and n not in names
            ]
    parts: dict[str, list[Path]] = {}
    for part in names:
        folder = base / part
        if part == "transformer" or not folder.is_dir():
            continue
        files = [path for path in sorted(folder.iterdir()) if path.suffix in _SMALL and path.is_file()]
        if has_weights(part) and any(folder.glob("*.safetensors")):
            files += weight_files(base, part)
        if files:
            parts[part] = files
    return parts


def _link_or_copy(source: Path, target: Path) -> None:
    """A file of another part. A large one is linked if its disk can: it takes no room then."""
    make_folder(target.parent)
    if target.exists():
        return
    real = source.resolve()
    if real.stat().st_size >= _LINKED_FROM:
        try:
            os.link(real, target)
            return
        except OSError:  # another disk, or one that has no links
            pass
    with new_file(target) as file, named(source), real.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            file.write(chunk)


def _check_room(out: Path, base: Path, shards: Sequence[_Shard], dtype: torch.dtype | None) -> None:
    """Refuse a disk on which the transformer, and copies of the other parts, do not fit."""
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    is_one_disk = there.stat().st_dev == base.stat().st_dev
    needed = sum(
        _num_bytes(tensor, dtype)
        for shard in shards if not _is_written(out / "transformer" / shard.name, shard, dtype)
        for tensor in shard.tensors
    )  # fmt: skip
    for part, files in _others(base).items():
        sizes = [file.stat().st_size for file in files if not (out / part / file.name).exists()]
        needed += sum(size for size in sizes if size < _LINKED_FROM or not is_one_disk)
    free = shutil.disk_usage(there).free
    if needed > free:
        raise OutputError(
            f"{out} needs {human_bytes(needed)} of disk, and {human_bytes(free)} are free",
            "Free some space, or choose another disk with -o",
        )


def _finish(out: Path, base: Path, shards: Sequence[_Shard], dtype: torch.dtype | None) -> None:
    """Write what makes the folder a checkpoint: the index, and the configs after all else."""
    folder = out / "transformer"
    if len(shards) > 1:
        total = sum(_num_bytes(tensor, dtype) for shard in shards for tensor in shard.tensors)
        weight_map = {tensor.name: shard.name for shard in shards for tensor in shard.tensors}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        with new_file(folder / f"{_STEM}.safetensors.index.json") as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")
    if (base / "model_index.json").is_file():
        _link_or_copy(base / "model_index.json", out / "model_index.json")
    _link_or_copy(base / "transformer" / "config.json", folder / "config.json")
