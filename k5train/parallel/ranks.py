"""Which share of the work is this process's, and what do the others say? One process alone answers for itself.

The processes of a run are its ranks, numbered from 0. Each has a GPU and the whole base; the first also writes
all files. Nothing here needs torch or a second process: what does is in
``together.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from k5cache.shared.errors import RunError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")


class RankLost(RunError):
    """Another process of the run has failed or died."""

    is_told = False
    """That process said why, and so prints it itself if it is the first one."""


class Ranks:
    """One process alone, which most runs are. ``Together`` is one of several, with the same methods."""

    rank: int = 0
    size: int = 1
    gpus: int | None = None
    """What ``--gpus`` was, for a command that goes on with the run. None: it was not given."""
    is_stopping = False
    """Somebody asked one of the processes to stop, as of the last ``gather``."""

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes the run's files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This process's items of those that all have to do together."""
        return items[self.rank :: self.size]

    def agree(self, value: T) -> T:
        """The value of the first process, as JSON, on every process. All of them call this at the same place."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, as JSON, in the order of their ranks. All of them call this."""
        return [value]

    def unite(self, items: Sequence[T]) -> list[T]:
        """All items, in the order that they had before each process took its ``share``. All of them call this."""
        return list(united(self.gather(list(items))))

    def collect(self, data: bytes) -> list[bytes]:
        """The bytes of all processes on the first one; nothing on the others. All of them call this."""
        return [data]

    def check(self) -> None:
        """Raise ``RankLost`` or ``KeyboardInterrupt`` if another process has ended. For long work between the rest."""

    def connect(self, device: torch.device, is_deterministic: bool) -> None:
        """Prepare ``add_up`` and ``copy_from_first`` on a device."""

    def add_up(self, values: Tensor) -> None:
        """Replace a flat tensor by its sum over all processes. Their order does not change the bits."""

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the bits that they have on the first process."""

    def wait_for_device(self) -> None:
        """Wait until what was launched is done. Raises ``RankLost`` if another process ends meanwhile."""


ALONE = Ranks()


def united(shares: Sequence[Sequence[T]]) -> Iterable[T]:
    """Items one from each share in turn, as ``Ranks.share`` dealt them out."""
    longest = max((len(share) for share in shares), default=0)
    return (share[place] for place in range(longest) for share in shares if place < len(share))
