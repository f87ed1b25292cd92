"""Where is the int8 base on disk? In a file under ``K5_HOME``, named by what it was made of. It is quantised once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from k5cache.shared import console
from k5cache.shared.errors import ModelError, OutputError
from k5cache.shared.files import remove_leftovers, write_whole
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.home import check_trusted, k5_home, make_home
from k5cache.shared.outputs import check_writable
from k5train.base.quantize import converted, empty_transformer, finish, place

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


FORMAT = 1
FOLDER = "base"
_DTYPES = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
# Fixed, because checksums are known only after the tensors are written. 3,000 tensors take 0.5 MB.
_HEADER_BYTES = 4 * 2**20
_THREADS = 4
_BEGIN = b'{"__metadata__": {"checksum": "'
_DIGITS = 16  # of the header's own xxh3_64, computed with zeros in their place
_CHECKSUM = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + _DIGITS)
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
    return k5_home() / FOLDER


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
        RunError: another user could have written what lies there.
    """
    path = prepared_path(folder, dtype)
    if not _is_usable(path):
        _quantise(path, folder, dtype, device)
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
        OutputError, RunError: as ``prepare``.
    """
    path = prepared_path(folder, dtype)
    if not _is_usable(path):
        _quantise(path, folder, dtype, device)
    transformer = empty_transformer(folder)
    try:
        _fill(transformer, path, device, on_host)
    except _Damaged as damage:
        _warn_of(path, damage)
        _quantise(path, folder, dtype, device)
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
    """A prepared file is not what was written. Says where."""


def _is_usable(path: Path) -> bool:
    """Whether there is a prepared file whose header is the one that was written. Notes why not.

    Raises:
        OutputError, RunError: as ``prepare``.
    """
    if not path.is_file():
        _check_writable(path)
        make_home(FOLDER)
        console.note(f"First use of this checkpoint: quantising it once into {path}")
        return False
    for part in (k5_home(), path.parent, path):
        check_trusted(part)
    try:
        with _opened(path):
            return True
    except _Damaged as damage:
        _warn_of(path, damage)
        return False


def _warn_of(path: Path, damage: _Damaged) -> None:
    console.warn(f"{path} is damaged ({damage}): quantising the checkpoint again")


def _quantise(path: Path, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Write the file, in the place of a damaged one."""
    _check_writable(path)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            _write(file, path.stem, folder, dtype, device)

    for leftover in remove_leftovers(path.parent):
        console.warn(f"{leftover} was left by a killed process of another user: remove it to free its space")
    write_whole(path, write)
    path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)  # whatever the umask is, or it would not be trusted


def _write(file: Any, name: str, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:
    """Leave room for the header, write the tensors, then the header with their checksums and its own."""
    facts = {"format": FORMAT, "name": name, "source": str(folder), "dtype": _DTYPES[dtype]}
    metadata = {"checksum": "0" * _DIGITS, "k5": json.dumps(facts)}
    header: dict[str, Any] = {"__metadata__": metadata}
    sums: dict[str, str] = {}
    file.write(b" " * (8 + _HEADER_BYTES))
    start = 0
    transformer = empty_transformer(folder)
    for key, tensor in converted(folder, transformer, "int8-quanto", dtype, device):
        data = tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        sums[key] = xxhash.xxh3_64_hexdigest(data)
        header[key] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start := start + data.nbytes],
        }
    metadata["xxh3_64"] = json.dumps(sums)
    text = json.dumps(header).encode()
    assert len(text) <= _HEADER_BYTES
    raw = struct.pack("<Q", _HEADER_BYTES) + text.ljust(_HEADER_BYTES)
    file.seek(0)
    file.write(raw[: _CHECKSUM.start] + xxhash.xxh3_64_hexdigest(raw).encode() + raw[_CHECKSUM.stop :])


@dataclass(frozen=True)
class _Opened:
    """A prepared file whose header is the one that was written."""

    descriptor: int
    tensors: dict[str, Any]
    sums: dict[str, str]
    facts: dict[str, Any]


@contextmanager
def _opened(path: Path) -> Iterator[_Opened]:
    """Read the header and compare it with its checksum.

    Raises:
        _Damaged: it has changed, or is of a version that saved no checksum of it; or the file has another length.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        raw = b"".join(iter(lambda: os.read(descriptor, 8 + _HEADER_BYTES - os.lseek(descriptor, 0, os.SEEK_CUR)), b""))
        if raw[: _CHECKSUM.start] != struct.pack("<Q", _HEADER_BYTES) + _BEGIN:
            raise _Damaged("it is not a base of this version")
        blank = raw[: _CHECKSUM.start] + b"0" * _DIGITS + raw[_CHECKSUM.stop :]
        if raw[_CHECKSUM] != xxhash.xxh3_64_hexdigest(blank).encode():
            raise _Damaged("its header is not the one that was written")
        tensors = json.loads(raw[8:])
        metadata = tensors.pop("__metadata__")
        facts = json.loads(metadata["k5"])
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if facts["name"] != path.stem:
            raise _Damaged("it is another checkpoint's base")
        if os.fstat(descriptor).st_size != 8 + _HEADER_BYTES + end:
            raise _Damaged("it is cut short, or something was appended to it")
        yield _Opened(descriptor, tensors, json.loads(metadata["xxh3_64"]), facts)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise _Damaged("the disk reports an error") from error
    finally:
        os.close(descriptor)


def _describe(path: Path) -> Prepared:
    num_bytes = path.stat().st_size
    try:
        with _opened(path) as opened:
            return Prepared(path, opened.facts["source"], opened.facts["dtype"], num_bytes, True)
    except _Damaged:
        return Prepared(path, "unknown", "unknown", num_bytes, False)


def _fill(
    transformer: Kandinsky5Transformer3DModel,
    path: Path,
    device: torch.device,
    on_host: Callable[[str, bool], bool],
) -> None:
    """Place every tensor of a prepared file in an empty transformer.

    Raises:
        _Damaged: the file has changed. The transformer is half filled.
    """
    with _opened(path) as opened:
        int8 = {name.rpartition(".")[0] for name, entry in opened.tensors.items() if entry["dtype"] == "I8"}

        def device_of(name: str) -> torch.device:
            return torch.device("cpu") if on_host(name, name.rpartition(".")[0] in int8) else device

        for name, tensor in _read(opened, device_of):
            place(transformer, name, tensor)


def _read(opened: _Opened, device_of: Callable[[str], torch.device]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of the file, its checksum verified.

    Threads read into buffers. A mapped file would be simpler, but its pages count as resident memory.
    """

    def read(name: str) -> Tensor:
        entry = opened.tensors[name]
        start, end = entry["data_offsets"]
        host = torch.empty(end - start, dtype=torch.uint8)
        view, done = host.numpy().data, 0
        while done < end - start:
            count = os.preadv(opened.descriptor, [view[done:]], 8 + _HEADER_BYTES + start + done)
            if count == 0:
                raise _Damaged(f"{name} is cut short")
            done += count
        if xxhash.xxh3_64_hexdigest(view) != opened.sums[name]:
            raise _Damaged(f"{name} is not what was written")
        return host.view(_TORCH[entry["dtype"]]).reshape(entry["shape"]).to(device_of(name))

    names = list(opened.tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead = [pool.submit(read, name) for name in names[: 2 * _THREADS]]
        for i, name in enumerate(names):
            tensor = ahead[i % len(ahead)].result()
            if i + len(ahead) < len(names):
                ahead[i % len(ahead)] = pool.submit(read, names[i + len(ahead)])
            yield name, tensor
