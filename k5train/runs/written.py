"""Is a LoRA in a run's folder the file that the run wrote? ``loras.json`` has the length and sha256 of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5cache.shared.plain import read_plain
from k5cache.shared.sealed import Digest, unseal, write_sealed

FILE = "loras.json"
_Digests = dict[str, list[Digest]]


@contextmanager
def recorded(root: Path, path: Path) -> Iterator[Callable[[Path], None]]:
    """Around the writing of a LoRA in a run: ``with recorded(run.root, path) as record: save(path, record)``.

    Args:
        root: the run's folder.

    Yields:
        called with the finished file before it gets its name. Until the end of the block either file is right, so that
        a kill between the two renames does no harm.
    """
    name = path.relative_to(root).as_posix()
    digests: list[Digest] = []

    def record(temporary: Path) -> None:
        digests.append(Digest.of(temporary))
        known = _read_or_begin(root)
        _write(root, {**known, name: [*known.get(name, []), *digests]}, name)

    yield record
    _write(root, {**_read_or_begin(root), name: digests}, name)


def check_recorded(path: Path) -> bool:
    """Compare a LoRA with what its run wrote.

    Returns:
        False if there is nothing to compare it with: it is not in a run, or an earlier version wrote it.

    Raises:
        RunError: it has changed, or the run's list of checksums has.
    """
    root = root_of(path)
    if not (root / FILE).is_file():
        return False
    digests = _read(root).get(path.relative_to(root).as_posix())
    if not digests:
        return False
    if Digest.of(path) not in digests:
        raise RunError(
            f"{path} is not the file that the run wrote: its checksum does not match",
            f"Use another LoRA of {root} or a copy of this one. If you changed it yourself, move it out of the run",
        )
    return True


def is_as_recorded(path: Path) -> bool | None:
    """Whether a LoRA of a run is the file that the run wrote. None: there is no checksum to compare it with."""
    root = root_of(path)
    digests = (_read_or_none(root) or {}).get(path.relative_to(root).as_posix())
    return Digest.of(path) in digests if digests else None


def recorded_files(root: Path) -> list[Path]:
    """The LoRAs in a run's folder that are on its list. Empty if that cannot be read."""
    return [root / name for name in _read_or_none(root) or {} if (root / name).is_file()]


def root_of(path: Path) -> Path:
    """The run that a LoRA is in, if it is in one."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def _read(root: Path) -> _Digests:
    try:
        files = unseal(read_plain(root / FILE))["files"]
        return {str(name): [Digest.read(digest) for digest in digests] for name, digests in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{root / FILE} is not the file that was written, so the LoRAs cannot be compared with it",
            "Remove it to use them as they are",
        ) from error


def _read_or_none(root: Path) -> _Digests | None:
    """The list, empty if there is none; None if it is damaged."""
    try:
        return _read(root) if (root / FILE).is_file() else {}
    except RunError:
        return None


def _read_or_begin(root: Path) -> _Digests:
    """The digests known so far. A damaged list is begun anew: the run goes on and writes its LoRAs again."""
    digests = _read_or_none(root)
    if digests is None:
        console.warn(f"{root / FILE} is not the file that was written: it is begun anew, without the LoRAs until now")
    return digests or {}


def _write(root: Path, digests: Mapping[str, list[Digest]], new: str) -> None:
    there = {name: known for name, known in digests.items() if name == new or (root / name).is_file()}
    write_sealed(root / FILE, {"files": {name: [asdict(digest) for digest in known] for name, known in there.items()}})
