"""Where is the int8 base on disk? In a file under ``K5_HOME``, named by what it was made of. It is quantised once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from k5cache.shared import console
from k5cache.shared.errors import ModelError, OutputError
from k5cache.shared.files import write_whole
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.home import k5_home
from k5cache.shared.outputs import check_writable
from k5train.base.quantize import converted, empty_transformer, finish, place

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


FORMAT = 1
_DTYPES = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
# Fixed, because checksums are known only after the tensors are written. 3,000 tensors take 0.5 MB.
_HEADER_BYTES = 4 * 2**20
_THREADS = 4
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors", re.ASCII)


@dataclass(frozen=True)
class Prepared:
    """One prepared base, and what it was made from."""

    path: Path
    source: str
    dtype: str
    num_bytes: int
    is_whole: bool
    """Whether its header can be read and its length is what the header says."""


def home() -> Path:
    """The folder of prepared bases: ``$K5_HOME/base``, by default ``~/.cache/k5/base``."""
    return k5_home() / "base"


def prepared_path(folder: Path, dtype: torch.dtype) -> Path:
    """Where the int8 base of a checkpoint is, or would be. Its name is a hash of everything that decides its numbers.

    Raises:
        ModelError: the checkpoint's weights are missing or damaged.
    """
    identity = [FORMAT, fingerprint(folder, "transformer"), _DTYPES[dtype], version("optimum-quanto")]
    return home() / f"{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]}.safetensors"


def prepare(folder: Path, dtype: torch.dtype, device: torch.device | str) -> Path:
    """Quantise a checkpoint into a safetensors file, tensor by tensor, unless the file exists.

    The file gets its name when it is whole and on disk, so that nothing reads half a file.

    Args:
        dtype: dtype of the scales and of what is not quantised.
        device: where to quantise.

    Raises:
        ModelError: tensors that are missing, unexpected, misshapen or unreadable.
        OutputError: the folder under ``K5_HOME`` cannot be written.
    """
    path = prepared_path(folder, dtype)
    if path.is_file() and _describe(path).is_whole:
        return path
    _check_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)

    def quantise(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write(file, folder, dtype, device)

    write_whole(path, quantise)
    return path


def load_prepared(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    on_host: Callable[[str, bool], bool] = lambda name, is_int8: False,
) -> Kandinsky5Transformer3DModel:
    """The same as ``load_transformer(folder, "int8-quanto", dtype, device)``, read from the prepared file.

    Args:
        on_host: called with a tensor's name and whether its linear is int8. True if the tensor stays in host memory,
            to be streamed.

    Raises:
        ModelError: there is no prepared file, and the checkpoint is missing, incomplete or damaged.
    """
    path = prepared_path(folder, dtype)
    if not (path.is_file() and _describe(path).is_whole):
        console.note(f"First use of this checkpoint: quantising it once into {path}")
        prepare(folder, dtype, device)
    transformer = empty_transformer(folder)
    try:
        _fill(transformer, path, device, on_host)
    except _Damaged as damage:
        console.warn(f"{path} is damaged at {damage}: quantising the checkpoint again")
        path.unlink()
        prepare(folder, dtype, device)
        transformer = empty_transformer(folder)
        _fill(transformer, path, device, on_host)
    return finish(transformer, device)


def list_bases() -> list[Prepared]:
    """Every prepared base. Files with other names than ``prepared_path`` gives are someone else's."""
    return [_describe(path) for path in sorted(home().glob("*.safetensors")) if _NAME.fullmatch(path.name)]


def remove(name: str) -> Prepared:
    """Remove one prepared base. The next run that needs it writes it again.

    Args:
        name: its file name, or the beginning of it.

    Raises:
        ModelError: no file name starts with ``name``, or several do.
    """
    bases = [base for base in list_bases() if name and base.path.name.startswith(name)]
    if len(bases) != 1:
        raise ModelError(
            f"{len(bases)} prepared bases under {home()} begin with {name!r}", "See their names: k5train base list"
        )
    bases[0].path.unlink()
    return bases[0]


def _check_writable(path: Path) -> None:
    try:
        check_writable(path)
    except OutputError as error:
        raise OutputError(error.problem, "Set K5_HOME to a folder that can be written") from None


class _Damaged(Exception):
    """A tensor of a prepared file is not what was written."""


def _write(file: Any, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Leave room for the header, write the tensors, then the header with their checksums."""
    header: dict[str, Any] = {
        "__metadata__": {"k5": json.dumps({"format": FORMAT, "source": str(folder), "dtype": _DTYPES[dtype]})}
    }
    sums: dict[str, str] = {}
    file.write(b" " * (8 + _HEADER_BYTES))
    start = 0
    transformer = empty_transformer(folder)
    for name, tensor in converted(folder, transformer, "int8-quanto", dtype, device):
        data = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        sums[name] = xxhash.xxh3_64_hexdigest(data)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start := start + data.nbytes],
        }
    header["__metadata__"]["xxh3_64"] = json.dumps(sums)
    text = json.dumps(header).encode()
    assert len(text) <= _HEADER_BYTES
    file.seek(0)
    file.write(struct.pack("<Q", _HEADER_BYTES) + text.ljust(_HEADER_BYTES))


def _header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if not 0 < size <= _HEADER_BYTES:
            raise ValueError(f"a header of {size} bytes")
        header: dict[str, Any] = json.loads(file.read(size))
        return header


def _describe(path: Path) -> Prepared:
    num_bytes = path.stat().st_size
    try:
        header = _header(path)
        facts = json.loads(header.pop("__metadata__")["k5"])
        end = max(entry["data_offsets"][1] for entry in header.values())
        is_whole = num_bytes == 8 + _HEADER_BYTES + end and facts["format"] == FORMAT
        return Prepared(path, facts["source"], facts["dtype"], num_bytes, is_whole)
    except (ValueError, KeyError, TypeError, struct.error):
        return Prepared(path, "unknown", "unknown", num_bytes, False)


def _fill(
    transformer: Kandinsky5Transformer3DModel,
    path: Path,
    device: torch.device,
    on_host: Callable[[str, bool], bool],
) -> None:
    """Place every tensor of a prepared file in an empty transformer."""
    header = _header(path)
    sums = json.loads(header.pop("__metadata__")["xxh3_64"])
    int8 = {name.rpartition(".")[0] for name, entry in header.items() if entry["dtype"] == "I8"}

    def device_of(name: str) -> torch.device:
        return torch.device("cpu") if on_host(name, name.rpartition(".")[0] in int8) else device

    for name, tensor in _read(path, header, sums, device_of):
        place(transformer, name, tensor)


def _read(
    path: Path, header: dict[str, Any], sums: dict[str, str], device_of: Callable[[str], torch.device]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of the file, its checksum verified.

    Threads read into buffers. A mapped file would be simpler, but its pages count as resident memory.
    """
    descriptor = os.open(path, os.O_RDONLY)

    def read(name: str) -> Tensor:
        entry = header[name]
        start, end = entry["data_offsets"]
        host = torch.empty(end - start, dtype=torch.uint8)
        view, done = host.numpy().data, 0
        while done < end - start:
            count = os.preadv(descriptor, [view[done:]], 8 + _HEADER_BYTES + start + done)
            if count == 0:
                raise _Damaged(name)
            done += count
        if xxhash.xxh3_64_hexdigest(view) != sums[name]:
            raise _Damaged(name)
        return host.view(_TORCH[entry["dtype"]]).reshape(entry["shape"]).to(device_of(name))

    names = list(header)
    try:
        with ThreadPoolExecutor(_THREADS) as pool:
            ahead = [pool.submit(read, name) for name in names[: 2 * _THREADS]]
            for i, name in enumerate(names):
                tensor = ahead[i % len(ahead)].result()
                if i + len(ahead) < len(names):
                    ahead[i % len(ahead)] = pool.submit(read, names[i + len(ahead)])
                yield name, tensor
    finally:
        os.close(descriptor)
