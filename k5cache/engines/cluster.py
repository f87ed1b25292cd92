"""How does Ray start on this machine, or how is a cluster joined? Quietly, within a bounded time, and left clean.

Ray's variables must be set before it is imported: nothing is reported to its makers, no dashboard is started, and the
token of a Ray of our own is in its processes' environment alone, not in a file of the user's home.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5cache.shared.errors import EngineError
from k5cache.shared.gpus import choose_gpus, variable_of, visible_gpus
from k5cache.shared.template import version
from k5cache.shared.units import count_of

OLDEST, NEXT_MAJOR = (2, 50), 3
INSTALL = 'pip install "kandinsky5-lora[ray]"'
SECONDS_TO_CONNECT = 10.0  # to a port
SECONDS_TO_ANSWER = 60.0  # most of which a busy machine needs to import Ray
_NO_REPORTS = {"RAY_USAGE_STATS_ENABLED": "0"}
_QUIET = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_LOG_LEVEL": "CRITICAL",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_SCHEDULER_EVENTS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Node:
    """One machine of a cluster."""

    id: str
    name: str
    num_gpus: int
    num_cpus: float


@dataclass(frozen=True)
class Cluster:
    """A Ray that this process is connected to."""

    nodes: tuple[Node, ...]
    """Those with a processor or a GPU to compute with."""
    num_gpus: int
    """That an encode may use; 0: it computes on processors."""
    object_bytes: int
    """Of memory that processes of one machine share, the least of all machines."""

    @property
    def num_cpus(self) -> float:
        """Of the machine with the fewest, of those that have some."""
        return min(node.num_cpus for node in self.nodes if node.num_cpus)


def check_installed() -> None:
    """Refuse if there is no Ray, or one of another version.

    Raises:
        EngineError: says what to install.
    """
    found = version("ray")
    if found is None:
        raise EngineError("--engine ray needs the package ray, which is not installed", f"Run: {INSTALL}")
    numbers = tuple(int(part) if part.isdigit() else 0 for part in found.split(".")[:2])
    if numbers < OLDEST or numbers[0] >= NEXT_MAJOR:
        wanted = f"from {'.'.join(map(str, OLDEST))} on and below {NEXT_MAJOR}"
        raise EngineError(f"--engine ray needs a ray {wanted}, and {found} is installed", f"Run: {INSTALL}")


@contextmanager
def joined(address: str | None, gpus: int | None, device: str) -> Iterator[Cluster]:
    """Be connected to a Ray: one that the process has already, the one at ``address``, or a new one of this machine.

    Args:
        gpus: how many to use; None: all.
        device: ``auto``, ``cuda`` or ``cpu``.

    Raises:
        EngineError: there is no Ray to be had, or it has not so many GPUs.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        yield _cluster_of(sys.modules["ray"], address, gpus, device)
        return
    keys = () if address or device == "cpu" else (choose_gpus(gpus) if gpus is not None else visible_gpus())
    if device == "cuda" and not (address or keys):
        raise _no_gpu("this machine")
    variables = {name: value for name, value in _QUIET.items() if name not in os.environ} | _NO_REPORTS
    if not address:
        if "ray" not in sys.modules:  # it reads the mode when it is imported
            variables |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        variables |= {variable_of(): ",".join(keys)} if keys else {}
    with ExitStack() as stack:
        stack.enter_context(system.variables_set(variables))
        keep_signals = stack.enter_context(_signals_kept())
        where = ""
        if address:
            where, mode = _answering(address)
            stack.enter_context(system.variables_set({"RAY_AUTH_MODE": mode}))
        import ray

        try:
            _connect(address, where) if address else _start(len(keys))
            keep_signals()
            _silence()
            yield _cluster_of(ray, address, gpus, device)
        finally:
            ray.shutdown()


def _start(num_gpus: int) -> None:
    """Start Ray on this machine. It gives up after half a minute by itself, which a busy machine may need twice."""
    import ray

    for is_last in (False, True):
        try:
            with _nothing_printed():
                ray.init(address="local", num_gpus=num_gpus, **_OPTIONS)
        except Exception as error:
            ray.shutdown()
            is_of_disk = isinstance(error, OSError) and error.filename  # a time limit has no file
            if is_last or is_of_disk:
                fix = _FOLDER if is_of_disk else CHECK
                raise EngineError(f"Ray does not start on this machine: {_words(error)}", fix) from error
        else:
            return


def _connect(name: str, address: str) -> None:
    import ray

    try:
        with _nothing_printed():
            ray.init(address=address, **_OPTIONS)
    except Exception as error:  # of many kinds: another version of Python or Ray, a machine outside the cluster
        raise EngineError(f"The Ray cluster at {name} cannot be joined: {_words(error)}", _HEAD) from error


_OPTIONS: dict[str, Any] = {
    "include_dashboard": False,
    "log_to_driver": False,
    "configure_logging": False,
    "logging_level": logging.CRITICAL,
}
_HEAD = "Start one with `ray start --head --port 6379`, run this command on a machine of it, and give --address auto"
_TOKEN = (
    "Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head; on all machines alike"
)
_FOLDER = "Correct this, or give Ray another folder with a short name: RAY_TMPDIR=/var/tmp/ray k5cache ..."
LOGS = f"Ray's logs are in {os.environ.get('RAY_TMPDIR', '/tmp')}/ray/session_latest/logs"
CHECK = f"Close other programs and run the same command again; {LOGS}"


def _answering(address: str) -> tuple[str, str]:
    """HOST:PORT of the cluster and its ``RAY_AUTH_MODE``. Another process joins it first, which Ray may end.

    Raises:
        EngineError: nothing answers there, or something that is no Ray.
    """
    if address != "auto":
        _check_port(address)
    program = Path(__file__).with_name("try_to_join.py")
    command = [sys.executable, "-P", str(program), address, str(SECONDS_TO_CONNECT)]
    try:
        done = subprocess.run(
            command, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=SECONDS_TO_ANSWER
        )
    except subprocess.TimeoutExpired as error:
        where = _where(address, os.fsdecode(error.stdout or b""))
        raise EngineError(f"What listens at {where} does not answer as a Ray cluster does", _HEAD) from None
    if done.returncode:
        where = _where(address, done.stdout)
        if _NO_TOKEN.search(done.stderr):
            raise EngineError(f"The Ray cluster at {where} wants a token that this command does not have", _TOKEN)
        raise EngineError(f"No Ray cluster answers at {where}: {words_of(done.stderr)}", _HEAD)
    mode, where = done.stdout.split()[-2:]
    return where, mode


def _where(address: str, output: str) -> str:
    """An address as it was given, and what ``auto`` stands for: a Ray that was killed leaves its address in a file."""
    meant = next(iter(output.split()), "")
    return f"{address}, which is {meant}" if meant else address


def _check_port(address: str) -> None:
    """Raises ``EngineError`` if nothing listens there."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit() or int(port) >= 2**16:
        raise EngineError(
            f"--address {address} is not an address of a cluster",
            "Give auto, or HOST:6379 of `ray start --head`, on a machine of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), SECONDS_TO_CONNECT).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or ("timed out" if isinstance(error, TimeoutError) else str(error))
        raise EngineError(f"No Ray cluster answers at {address}: {reason}", _HEAD) from error


@contextmanager
def _nothing_printed() -> Iterator[None]:
    """Ray's own code writes a line to stderr while it starts."""
    if sys.stderr is None:  # closed: `2>&-`
        yield
        return
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


def _cluster_of(ray: Any, address: str | None, gpus: int | None, device: str) -> Cluster:
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = tuple(
        Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
             int(node["Resources"].get("GPU", 0)), node["Resources"].get("CPU", 0.0))
        for node in alive
    )  # fmt: skip
    found = sum(node.num_gpus for node in nodes)
    where = f"the cluster at {address}" if address else "this machine"
    if gpus is not None and not 1 <= gpus <= found:
        raise EngineError(
            f"--gpus {gpus}: {where} has {count_of(found, 'GPU')}",
            f"Use --gpus {found}" if found else "Leave --gpus out, and it computes on processors",
        )
    if device == "cuda" and not found:
        raise _no_gpu(where)
    num_gpus = 0 if device == "cpu" else gpus or found
    of_use = tuple(node for node in nodes if node.num_gpus or (node.num_cpus and not num_gpus))
    of_use = of_use if num_gpus or of_use else nodes
    decoding = tuple(node for node in nodes if node.num_cpus)
    if not decoding:
        raise EngineError(f"No machine of {where} has a processor for Ray", "Start it with --num-cpus 1 or more")
    store = min(node["Resources"].get("object_store_memory", 2**30) for node in alive)
    return Cluster(tuple(dict.fromkeys((*of_use, *decoding))), num_gpus, int(store))


def missing() -> str:
    """Which of Ray's two processes that this one needs has ended; empty if both are there.

    Ray itself ends this process then, before anything can be said or committed.
    """
    import ray
    from ray._private import worker

    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not system.is_heard(family, (host.strip("[]"), int(port)), SECONDS_TO_CONNECT):
        return "the head"
    path = getattr(getattr(worker, "_global_node", None), "raylet_socket_name", None) or "tcp:"
    of_paths = system.path_sockets()
    if of_paths is None or path.startswith("tcp:"):
        return ""
    is_there = system.is_heard(of_paths, path.removeprefix("unix:"), SECONDS_TO_CONNECT)
    return "" if is_there else "its process on this machine"


def _no_gpu(where: str) -> EngineError:
    return EngineError(f"--device cuda: {where} has no GPU", "Use --device cpu")


@contextmanager
def _signals_kept() -> Iterator[Callable[[], None]]:
    """Yield a function that has signals handled as before: Ray puts its own handler in the place of ours."""
    before = [(number, signal.getsignal(number)) for number in system.stop_signals()]

    def restore() -> None:
        for number, handler in before:
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()


def _silence() -> None:
    """Ray prints what befalls its processes on stdout, where our result goes. We say it in our own words."""
    from ray._private import worker

    if hasattr(worker, "_worker_logs_enabled"):
        worker._worker_logs_enabled = False

    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _words(error: BaseException) -> str:
    """What an error says."""
    return words_of(str(error)) or type(error).__name__


def words_of(text: str) -> str:
    """What an error or a traceback says at its end, in one line: Ray puts a traceback into the text of its errors."""
    lines = [" ".join(_COLOUR.sub("", line).split()) for line in text.splitlines() if line.strip()]
    raised = [i for i, line in enumerate(lines) if _RAISED.match(line)]
    said = " ".join(lines[raised[-1] :]) if raised else next(iter(lines), "")
    return _NUMBER.sub("", _RAISED.sub("", said, count=1))[:300]


_NO_TOKEN = re.compile(r"AuthenticationError|InvalidAuthToken|authentication_token_loader")  # the last ends a process
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_RAISED = re.compile(r"[\w.]*(?:Error|Exception): ")
_NUMBER = re.compile(r"^\[Errno \d+\] ")
