"""Where is the int8 base on disk? In a file under ``K5_HOME``, named by what it was made of. It is quantised once."""

from __future__ import annotations

import hashlib
import json
import math
import stat
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor

from k5cache.shared import console, system
from k5cache.shared.errors import OutputError
from k5cache.shared.files import remove_leftovers, write_whole
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.home import check_trusted, k5_home, make_home
from k5cache.shared.lock import Locked, lock_file
from k5cache.shared.outputs import check_writable
from k5train.base.prepared_files import CHECKSUM, DIGITS, FOLDER, HEADER_BYTES, Damaged, Opened, home, opened
from k5train.base.quantize import converted, empty_transformer, finish, place

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


FORMAT = 1
_DTYPES = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
_THREADS = 4


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
    seen = _version(path)
    if not _is_usable(path):
        _quantise(path, seen, folder, dtype, device)
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
    seen = _version(path)
    if not _is_usable(path):
        _quantise(path, seen, folder, dtype, device)
        seen = _version(path)
    transformer = empty_transformer(folder)
    try:
        _fill(transformer, path, device, on_host)
    except Damaged as damage:
        _warn_of(path, damage)
        _quantise(path, seen, folder, dtype, device)
        transformer = empty_transformer(folder)
        _fill(transformer, path, device, on_host)
    return finish(transformer, device)


def _check_writable(path: Path) -> None:
    try:
        check_writable(path)
    except OutputError as error:
        raise OutputError(error.problem, "Set K5_HOME to a folder that can be written") from None


def _is_usable(path: Path) -> bool:
    """Whether there is a prepared file whose header is the one that was written. Warns of a damaged one.

    Raises:
        OutputError, RunError: as ``prepare``.
    """
    if not path.is_file():
        _check_writable(path)
        make_home(FOLDER)
        return False
    for part in (k5_home(), path.parent, path):
        check_trusted(part)
    try:
        with opened(path):
            return True
    except Damaged as damage:
        _warn_of(path, damage)
        return False


def _warn_of(path: Path, damage: Damaged) -> None:
    console.warn(f"{path} is damaged ({damage}): quantising the checkpoint again")


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Let one process of this user quantise into a folder: each would read and write the same gigabytes."""
    lock = folder / f".lock-{system.user_id() or 0}"  # another user's could not be opened
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_file(lock))
        except Locked as error:
            console.note(f"Waiting for {error.owner}, which quantises a checkpoint")
            stack.enter_context(lock_file(lock, math.inf))
        yield


def _version(path: Path) -> tuple[int, int] | None:
    """What tells a file from the one that takes its place; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _quantise(
    path: Path, seen: tuple[int, int] | None, folder: Path, dtype: torch.dtype, device: torch.device | str
) -> None:
    """Write the file, in the place of a damaged one, unless another process does so meanwhile.

    Args:
        seen: the ``_version`` of the file that is missing or damaged.
    """
    _check_writable(path)
    with _one_at_a_time(path.parent):
        if _version(path) not in (None, seen):  # whole, since it appears under its name at once
            return
        if seen is None:
            console.note(f"First use of this checkpoint: quantising it once into {path}")
        _write_file(path, folder, dtype, device)


def _write_file(path: Path, folder: Path, dtype: torch.dtype, device: torch.device | str) -> None:

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
    metadata = {"checksum": "0" * DIGITS, "k5": json.dumps(facts)}
    header: dict[str, Any] = {"__metadata__": metadata}
    sums: dict[str, str] = {}
    file.write(b" " * (8 + HEADER_BYTES))
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
    assert len(text) <= HEADER_BYTES
    raw = struct.pack("<Q", HEADER_BYTES) + text.ljust(HEADER_BYTES)
    file.seek(0)
    file.write(raw[: CHECKSUM.start] + xxhash.xxh3_64_hexdigest(raw).encode() + raw[CHECKSUM.stop :])


def _fill(
    transformer: Kandinsky5Transformer3DModel,
    path: Path,
    device: torch.device,
    on_host: Callable[[str, bool], bool],
) -> None:
    """Place every tensor of a prepared file in an empty transformer.

    Raises:
        Damaged: the file has changed. The transformer is half filled.
    """
    with opened(path) as file:
        int8 = {name.rpartition(".")[0] for name, entry in file.tensors.items() if entry["dtype"] == "I8"}

        def device_of(name: str) -> torch.device:
            return torch.device("cpu") if on_host(name, name.rpartition(".")[0] in int8) else device

        for name, tensor in _read(file, device_of):
            place(transformer, name, tensor)


def _read(file: Opened, device_of: Callable[[str], torch.device]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in the order of the file, its checksum verified.

    Threads read into buffers. A mapped file would be simpler, but its pages count as resident memory.
    """

    def read(name: str) -> Tensor:
        entry = file.tensors[name]
        start, end = entry["data_offsets"]
        host = torch.empty(end - start, dtype=torch.uint8)
        view, done = host.numpy().data, 0
        while done < end - start:
            count = system.read_into(file.descriptor, [view[done:]], 8 + HEADER_BYTES + start + done)
            if count == 0:
                raise Damaged(f"{name} is cut short")
            done += count
        if xxhash.xxh3_64_hexdigest(view) != file.sums[name]:
            raise Damaged(f"{name} is not what was written")
        return host.view(_TORCH[entry["dtype"]]).reshape(entry["shape"]).to(device_of(name))

    names = list(file.tensors)
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead = [pool.submit(read, name) for name in names[: 2 * _THREADS]]
        for i, name in enumerate(names):
            tensor = ahead[i % len(ahead)].result()
            if i + len(ahead) < len(names):
                ahead[i % len(ahead)] = pool.submit(read, names[i + len(ahead)])
            yield name, tensor
