"""How do the processes of a run add up their gradients, and end together?

``meeting.py`` brings them together, ``channel.py`` carries what is said on the host, and NCCL, or gloo on CPUs, adds up
gradients. Whoever waits for the others asks the channel meanwhile, because NCCL itself waits for a dead one forever.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from k5cache.shared import console, disk_errors, interrupt, system
from k5cache.shared.errors import K5Error, RunError
from k5train.parallel.channel import Channel
from k5train.parallel.line import BEAT, DONE, FAILED, STOPPED
from k5train.parallel.meeting import QUIET, meet
from k5train.parallel.ranks import RankLost, Ranks
from k5train.parallel.world import World, gpu_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")
_POLL = 0.0005  # seconds; an update takes a hundred times that
_CHUNK = 1 << 24  # elements that are gathered from all processes at once: 64 MB from each
LATE = 1800.0
"""Seconds for which a sum waits for the others, which live and may be slow. Those of a suspended job do not count."""
# NCCL's own watchers would end the process before the run's state is saved.
_NCCL = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class Together(Ranks):
    """One of several processes.

    Args:
        store: of torch, by which the processes find each other.
    """

    def __init__(self, world: World, channel: Channel, store: Store) -> None:
        self.rank, self.size, self.gpus = world.rank, world.size, world.size if world.is_launched else None
        self.channel, self._store = channel, store
        self._device: torch.device | None = None
        self._is_deterministic = False
        self._backend = "gloo"
        self._work: Any = None

    def agree(self, value: T) -> T:
        """As ``Ranks``."""
        agreed: T = json.loads(self.channel.broadcast(json.dumps(value).encode()))
        return agreed

    def gather(self, value: Any) -> list[Any]:
        """As ``Ranks``. Also tells the others if this process was asked to stop."""
        own = json.dumps({"value": value, "stop": interrupt.is_pending()}).encode()
        everyones = self.channel.broadcast(b"[" + b",".join(self.channel.collect(own)) + b"]")
        parts = json.loads(everyones)
        self.is_stopping = any(part["stop"] for part in parts)
        return [part["value"] for part in parts]

    def collect(self, data: bytes) -> list[bytes]:
        """As ``Ranks``."""
        return self.channel.collect(data)

    def check(self) -> None:
        """As ``Ranks``."""
        self.channel.check()

    def connect(self, device: torch.device, is_deterministic: bool) -> None:
        """As ``Ranks``.

        Raises:
            RunError: NCCL or gloo cannot connect the processes; with the first line of what it said.
        """
        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        is_gpu = device.type == "cuda"
        card = str(torch.cuda.get_device_properties(device).uuid) if is_gpu else ""
        cards = self.gather([socket.gethostname(), card, torch.cuda.get_device_name(device) if is_gpu else ""])
        are_apart = len({tuple(c) for c in cards}) == self.size
        if len(kinds := {kind for *_, kind in cards}) > 1 and self.is_first:
            console.warn(
                f"The GPUs are of several kinds ({', '.join(sorted(kinds))}): all go at the pace of the slowest, and a"
                " resumed run is the same within rounding only"
            )
        is_nccl = device.type == "cuda" and are_apart and distributed.is_nccl_available()
        if device.type == "cuda" and not are_apart and self.is_first:
            console.warn("Several processes train on one GPU: they take turns, and it is not faster than one")
        for name, value in _NCCL.items():
            os.environ.setdefault(name, value)
        self._backend, self._device, self._is_deterministic = "nccl" if is_nccl else "gloo", device, is_deterministic
        with self._named():
            distributed.init_process_group(
                self._backend, store=PrefixStore("k5", self._store), rank=self.rank, world_size=self.size,
                timeout=timedelta(seconds=2 * LATE),  # later than ``_until`` gives up, which says who is late
            )  # fmt: skip
        ones = torch.ones(8, device=device)
        self.add_up(ones)  # makes the connections
        self.wait_for_device()
        if ones[0].item() != self.size:
            raise RunError(f"{self._backend} adds up wrongly: {self.size} ones give {ones[0].item():g}", _NCCL_ADVICE)

    def add_up(self, values: Tensor) -> None:
        """As ``Ranks``.

        Two numbers have the same sum in either order, and three do not. So a deterministic run of more than two
        processes gathers the values and adds them up in the order of the ranks.
        """
        import torch
        from torch import distributed

        if self.size == 2 or not self._is_deterministic:
            self._do(lambda: distributed.all_reduce(values, async_op=True))
            return
        for chunk in torch.split(values, _CHUNK):
            parts = [torch.empty_like(chunk) for _ in range(self.size)]
            self._do(lambda parts=parts, chunk=chunk: distributed.all_gather(parts, chunk, async_op=True))  # type: ignore[misc]
            chunk.copy_(parts[0])
            for part in parts[1:]:
                chunk.add_(part)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """As ``Ranks``."""
        from torch import distributed

        for tensor in tensors:
            self._do(lambda tensor=tensor: distributed.broadcast(tensor.detach(), 0, async_op=True))  # type: ignore[misc]
        self.wait_for_device()

    def wait_for_device(self) -> None:
        """As ``Ranks``."""
        if self._device is None or self._device.type != "cuda":
            self.channel.check()
            return
        import torch

        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._until(event.query)

    def end(self, kind: str, problem: str = "", fix: str = "") -> None:
        """Say to the others how this process ends, and leave them."""
        from torch import distributed

        self.channel.end(kind, problem, fix)
        if distributed.is_initialized():
            if kind == DONE:
                distributed.destroy_process_group()
            else:
                self._abort()

    def _do(self, start: Callable[[], Any]) -> None:
        self.channel.pulse.place += 1
        with self._named():
            work = start()
        self._work = work
        if self._backend == "gloo":
            self._until(work.is_completed)
        with self._named():
            work.wait()  # of NCCL it is the stream that waits, and wait_for_device that notices if it does so forever

    def _until(self, is_done: Callable[[], bool]) -> None:
        pulse = self.channel.pulse
        last = pulse.beats + LATE / BEAT
        try:
            with self._named():
                while not is_done():
                    self.channel.check()
                    if pulse.beats > last:
                        raise too_late(self.channel.behind(), self._backend)
                    time.sleep(_POLL)
        except BaseException:
            self._abort()  # else the GPU waits on, and nothing could be saved
            raise

    def _abort(self) -> None:
        from torch import distributed

        if not distributed.is_initialized():
            return
        with suppress(RuntimeError, ValueError, AttributeError):
            if self._backend == "nccl":
                distributed.distributed_c10d._abort_process_group()
            else:  # it cannot be aborted, and to free it would wait for a process that hangs
                group = distributed.distributed_c10d._get_default_group()
                assert self._device is not None
                never_free(group, group._get_backend(self._device), self._work)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turn an error of NCCL or gloo into who has died, or else into two lines."""
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this type
            self.channel.wait_for_news(10)
            raise lost_connection(self._backend, error) from error


def never_free(*objects: object) -> None:
    """Keep objects until the system ends this process, so that nothing waits for what they wait for."""
    for one in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))


def too_late(behind: str, backend: str) -> RankLost:
    """The error for a sum that does not end although all processes live.

    Args:
        behind: the names of those that have not come to it.
    """
    if behind:
        return RankLost(
            f"{behind} lives, but the others have waited for it for {LATE / 60:.0f} min",
            "See where it is (py-spy dump --pid): a file system or a GPU may not answer",
        )
    return RankLost(
        f"{backend} has not added up the gradients in {LATE / 60:.0f} min, and all processes wait",
        _NCCL_ADVICE if backend == "nccl" else _GLOO_ADVICE,
    )


_GLOO_ADVICE = "Set GLOO_SOCKET_IFNAME to the network interface that they share"
_NCCL_ADVICE = "Set NCCL_DEBUG=INFO to see more, and NCCL_P2P_DISABLE=1 to try without direct copies between the GPUs"


def lost_connection(backend: str, error: Exception) -> RankLost:
    """The error for what NCCL or gloo said, which is a page long."""
    lines = [
        line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Exception raised")
    ]
    of_nccl = [line for line in lines if line.startswith(("Last error", "ncclUnhandled", "ncclSystem", "ncclInternal"))]
    last = lines[lines.index("Last error:") + 1 :][:1] if "Last error:" in lines else []
    words = " ".join([*lines[:1], *of_nccl[:1], *last])[:300]
    return RankLost(
        f"The processes of this run lost each other: {backend}: {words}",
        _NCCL_ADVICE if backend == "nccl" else _GLOO_ADVICE,
    )


@contextmanager
def joined(world: World, device: str) -> Iterator[Together]:
    """Find the other processes, and tell them how this one ends.

    Args:
        device: ``train.device``.

    Raises:
        RunError: another process failed, died or did not come; a port is taken. On another process than the first it
            names the rank.
        SystemExit: the first process has said why it ended. It prints it.
    """
    os.environ.update({**QUIET, **os.environ, **gpu_of(world, device)})
    if world.rank:
        console.err.quiet = console.out.quiet = True
    _follow_parent(world)
    if world.is_told:
        atexit.register(interrupt.ignore)
    ranks: Together | None = None
    with interrupt.counted_once() if world.is_told else nullcontext():
        try:
            ranks = Together(world, *meet(world))
            yield ranks
        except BaseException as error:
            if ranks is not None:
                ranks.end(*_words_of(error))
            _answer(world, error, ranks)
        ranks.end(DONE)


def _words_of(error: BaseException) -> tuple[str, str, str]:
    """How a process ends by an error, for the others."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED, "", ""
    if answer := _two_lines(error):
        return FAILED, *answer
    first = (str(error).strip() or "no message").splitlines()[0][:200]
    return FAILED, f"{type(error).__name__}: {first}", "Its own output has the traceback"


def _answer(world: World, error: BaseException, ranks: Together | None) -> NoReturn:
    """Raise what this process's own command line is to say."""
    if world.rank == 0:
        raise error
    if isinstance(error, RankLost) and error.is_told:
        raise SystemExit(2) from error
    if isinstance(error, KeyboardInterrupt):
        raise error
    answer = _two_lines(error)
    if answer and _says_the_same(ranks, answer):
        raise SystemExit(2) from error
    console.err.quiet = False
    if answer:
        raise RunError(f"Rank {world.rank}: {answer[0]}", answer[1]) from error
    raise error


def _says_the_same(ranks: Together | None, answer: tuple[str, str]) -> bool:
    """Whether the first process ends by the same error, which all find at once where it is in what all know."""
    if ranks is None:
        return False
    try:
        ranks.channel.wait_for_news(2)
    except RankLost as lost:
        return lost.is_told and lost.problem.endswith(answer[0])
    except KeyboardInterrupt:
        pass
    return False


def _two_lines(error: BaseException) -> tuple[str, str] | None:
    """The problem and the fix of an error that a command line prints as two lines; None if it is a bug."""
    if isinstance(error, K5Error):
        return error.problem, error.fix
    return disk_errors.sentence(error) if isinstance(error, Exception) else None


def _follow_parent(world: World) -> None:
    """Hear a second Ctrl-C from the process that started this one by ``--gpus``, and stop if that dies: the pipe that
    is this one's input then ends."""
    if not world.is_launched or sys.stdin is None:
        return

    def wait() -> None:
        with suppress(OSError, ValueError):
            while os.read(sys.stdin.fileno(), 99):  # not through Python's buffer, whose lock it must not hold at exit
                interrupt.hurry()
        system.interrupt()

    threading.Thread(target=wait, name="k5-parent", daemon=True).start()
