"""How do the processes of a run find each other? By torch's store, which the first one has on a port that all know.

torch's calls wait in C++, where no signal is answered, and for ever if another program has the port and says nothing.
So this process itself waits until somebody listens, and calls torch in a thread that it can leave.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from k5cache.shared.errors import RunError
from k5train.parallel import channel as channels
from k5train.parallel.channel import Channel
from k5train.parallel.world import World

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")


class NoAnswer(Exception):
    """Whoever listens says nothing."""


SECONDS_TO_COME = 120.0
SECONDS_TO_ANSWER = 10.0
"""For which torch tries to connect to whoever listens."""
_POLL = 0.05
_KEY = "k5-channel"
_USES_AGENTS_STORE = "TORCHELASTIC_USE_AGENT_STORE"
QUIET = {"TORCH_CPP_LOG_LEVEL": "FATAL"}
"""torch prints a page for each time that it cannot connect. The variable is read when torch is imported."""


def meet(world: World) -> tuple[Channel, Store]:
    """Find the other processes.

    Returns:
        the sockets to them, and torch's store, in which all read and write.

    Raises:
        RunError: one did not come, or the port belongs to another program.
    """
    from torch.distributed import DistError

    address, port = _place(world)
    try:
        store = _store(world, address, port)
        return _channel(world, store, address), store
    except (DistError, OSError, NoAnswer) as error:
        raise did_not_meet(world, address, port, error) from error


def in_thread(call: Callable[[], T], seconds: float) -> T:
    """The result of a call that no signal interrupts, while this process can be interrupted.

    Raises:
        NoAnswer: it has not returned after so many seconds. It is left to wait.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="k5-meeting", daemon=True)
    thread.start()
    deadline = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(_POLL)
        if time.monotonic() > deadline and thread.is_alive():
            raise NoAnswer(f"no answer within {seconds:.0f} s")
    if errors:
        raise errors[0]
    return results[0]


def _place(world: World, env: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Where the store is: ``MASTER_ADDR`` and ``MASTER_PORT``."""
    address, port = env.get("MASTER_ADDR", ""), env.get("MASTER_PORT", "")
    if not address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise RunError(
            f"RANK={world.rank} and WORLD_SIZE={world.size} are set, and MASTER_ADDR={address or '(unset)'} and"
            f" MASTER_PORT={port or '(unset)'} are not where the processes find each other",
            "Start the run by torchrun, which sets all of them, or unset RANK and WORLD_SIZE",
        )
    return address, int(port)


def _store(world: World, address: str, port: int, env: Mapping[str, str] = os.environ) -> Store:
    """torch's store, which the first process has, or torchrun."""
    from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

    is_ours = world.rank == 0 and env.get(_USES_AGENTS_STORE) != "True"
    deadline = time.monotonic() + SECONDS_TO_COME
    connect = partial(TCPStore, address, port, world.size, is_ours, timedelta(seconds=SECONDS_TO_ANSWER), False)
    while True:
        if not is_ours:
            _wait_for_listener(address, port, deadline)
        try:
            store = in_thread(connect, 2 * SECONDS_TO_ANSWER)  # ten seconds more than it should take
            store.set_timeout(timedelta(seconds=SECONDS_TO_COME))
            return store
        except DistError as error:
            # The first one may come later. What answers in other words does not become the first one.
            if is_ours or "Ping failed" in str(error) or time.monotonic() > deadline:
                raise


def _wait_for_listener(address: str, port: int, deadline: float) -> None:
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(5 * _POLL)


def _channel(world: World, store: Store, address: str) -> Channel:
    if world.rank == 0:
        is_here = world.local_size == world.size
        host = "127.0.0.1" if is_here else ("::" if socket.has_dualstack_ipv6() else "0.0.0.0")
        listener, port, word = channels.listen(host)
        store.set(_KEY, json.dumps([host if is_here else address, port, word]))
        return channels.accept(listener, word, world.size, SECONDS_TO_COME)
    deadline = time.monotonic() + SECONDS_TO_COME
    while not store.check([_KEY]):
        if time.monotonic() > deadline:
            raise channels.not_come("0", world.size, SECONDS_TO_COME)
        time.sleep(_POLL)
    host, port, word = json.loads(store.get(_KEY))
    return channels.call(host, port, word, world.rank, world.size, os.getpid(), SECONDS_TO_COME)


def did_not_meet(world: World, address: str, port: int, error: Exception) -> RunError:
    """The error for what torch's store or a socket said."""
    words = str(error).partition("\n")[0][:200]
    is_taken = "EADDRINUSE" in words or "address already in use" in words.lower()
    if is_taken or isinstance(error, NoAnswer) or "Ping failed" in words:
        belongs = "is taken" if is_taken else "answers, but not as the first process would: another program has it"
        return RunError(
            f"Port {port} of {address} {belongs}. The {world.size} processes were to find each other there",
            "Run it again" if world.is_launched else "Give torchrun another one (--master-port 29501), or MASTER_PORT",
        )
    return RunError(
        f"The {world.size} processes of this run did not find each other at {address}, port {port}: {words}",
        "Look at what the others printed; each must reach that address",
    )
