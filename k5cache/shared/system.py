"""What do other systems lack of what Linux has? All that is not the same on Windows and macOS is in this file.

Every function works where the call of Linux is missing, with the least that its callers need. Which calls are missing
is asked when they are needed, never at import. Locks are in ``lock.py``: the library filelock makes them everywhere.
"""

from __future__ import annotations

import _thread
import errno
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_SEEKING = threading.Lock()
"""Without ``pread``, threads that read one file share its position."""


def open_bytes(
    path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, is_followed: bool = True, may_wait: bool = True
) -> int:
    """Open a file for its bytes as they are; no child process inherits it. A new file has mode 666 less the umask.

    Args:
        is_followed: False to refuse a symbolic link.
        may_wait: False so that a pipe does not block until somebody writes to it.

    Returns:
        a file descriptor, which the caller closes.

    Raises:
        OSError: as ``os.open``; ``ELOOP`` for a link that is not followed.
    """
    flags |= _flag("O_CLOEXEC") | _flag("O_BINARY")  # O_BINARY: Windows would write \r\n for \n
    if not may_wait:
        flags |= _flag("O_NONBLOCK") | _flag("O_NOCTTY")
    if not is_followed:
        flags |= _flag("O_NOFOLLOW")
        if not _flag("O_NOFOLLOW") and os.path.islink(path):  # noqa: PTH114 (path may be a string)
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    return os.open(path, flags, 0o666)


def _flag(name: str) -> int:
    """One of ``os.O_...``; 0 on a system that does not have it."""
    return int(getattr(os, name, 0))


def is_read_only(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is on a file system that is mounted read-only, where no permission helps."""
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except (AttributeError, OSError):  # Windows has no such call
        return False


def read_at(fd: int, num_bytes: int, at: int) -> bytes:
    """Up to ``num_bytes`` of an open file from ``at`` on; several threads may read one file."""
    if hasattr(os, "pread"):
        return os.pread(fd, num_bytes, at)
    with _SEEKING:
        os.lseek(fd, at, os.SEEK_SET)
        return os.read(fd, num_bytes)


def read_into(fd: int, buffers: Sequence[Any], at: int) -> int:
    """Fill buffers one after another from ``at`` on; returns the bytes read, which may be fewer. Threads as above."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, buffers, at)
    memories = [memoryview(buffer).cast("B") for buffer in buffers]
    rest = data = memoryview(read_at(fd, sum(memory.nbytes for memory in memories), at))
    for memory in memories:
        part, rest = rest[: memory.nbytes], rest[memory.nbytes :]
        memory[: part.nbytes] = part
    return data.nbytes


def read_at_random(fd: int) -> None:
    """Tell the system that an open file is read in few places: else Linux reads 128 KiB around each."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)


def open_to_sync(path: Path) -> int | None:
    """Open a file or a folder so that ``os.fsync`` can make it durable.

    Returns:
        a file descriptor, which the caller closes. None for a folder on Windows, which cannot be opened there; its file
        system journals renames by itself.
    """
    if hasattr(os, "O_DIRECTORY"):
        return open_bytes(path)
    return None if path.is_dir() else open_bytes(path, os.O_RDWR)  # Windows refuses to sync what was opened to be read


def user_id() -> int | None:
    """The number of this process's user; None on Windows, whose files do not tell their owner by a number."""
    return os.geteuid() if hasattr(os, "geteuid") else None


def is_anothers(status: os.stat_result) -> bool:
    """Whether a file belongs to another user. False where that is not known."""
    user = user_id()
    return user is not None and status.st_uid != user


def user_name(number: int) -> str:
    """What a user is called."""
    try:
        import pwd

        return pwd.getpwuid(number).pw_name
    except (ImportError, KeyError):
        return f"user {number}"


def is_private_group(group: int) -> bool:
    """Whether a group is this user's private one, which many systems make for each user, with a umask of 002."""
    try:
        import grp
        import pwd

        user, members = pwd.getpwuid(os.geteuid()), grp.getgrgid(group)
    except (ImportError, KeyError):
        return False
    return user.pw_gid == group and members.gr_name == user.pw_name and not set(members.gr_mem) - {user.pw_name}


def is_another_process(pid: int) -> bool:
    """Whether another process than this one is running with this number, of any user."""
    import psutil  # os.kill(pid, 0) asks this on Linux, and sends Ctrl-C on Windows

    return pid != os.getpid() and bool(psutil.pid_exists(pid))


def interrupt() -> None:
    """Do what Ctrl-C does to this process, from any of its threads; also to one that ignores Ctrl-C (``command &``)."""
    if os.name == "nt":
        _thread.interrupt_main()  # there, os.kill ends the process
    else:
        is_ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM if is_ignored else signal.SIGINT)  # ends a call that waits, too


def stop_signals() -> list[int]:
    """The signals that ask a command to stop: Ctrl-C, what a cluster sends, and what Windows sends to one process."""
    return [signal.SIGINT, signal.SIGTERM, *([signal.SIGBREAK] if hasattr(signal, "SIGBREAK") else [])]


def process_mark(pid: int) -> str | None:
    """What tells a running process from every other one that has, had or will have its number, also after a reboot.

    Returns:
        None if there is none, or if it has ended and its parent has not noticed yet.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if state in "ZX":
            return None
        # Not psutil's time of birth: that moves when the clock is set.
        return f"{boot_mark()} {fields[18]}"
    except (OSError, ValueError, IndexError):
        pass
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.1f}"
    except (psutil.Error, ValueError, OverflowError):
        return None


def boot_mark() -> str:
    """The same until the machine is started again. Empty where the system does not say it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def machine_mark() -> str:
    """What tells this machine from others, also after a reboot. Where the system has nothing, until the next reboot."""
    for place in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with suppress(OSError, ValueError):
            mark = Path(place).read_text(encoding="ascii").strip()
            if len(mark) == 32 and mark.strip("0"):
                return mark
    import uuid

    return boot_mark() or f"{uuid.getnode():x}"


def start_apart(command: Sequence[str], *, is_in_same_console: bool = False, **options: Any) -> subprocess.Popen[bytes]:
    """Start a process in a session of its own: the end of this one, its terminal and a Ctrl-C there do not reach it.

    Args:
        is_in_same_console: on Windows, where only processes of one console can interrupt each other.
        options: of ``subprocess.Popen``.
    """
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    flags |= 0 if is_in_same_console else getattr(subprocess, "CREATE_NO_WINDOW", 0)
    return subprocess.Popen(command, start_new_session=True, creationflags=flags, **options)


def environment() -> dict[str, str]:
    """This process's variables, with which a Python that it starts finds our packages from any folder."""
    ours = str(Path(__file__).parents[2])
    given = [str(Path(place).absolute()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys([ours, *given]))}


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for this process and those that it starts meanwhile; afterwards all is as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def interrupt_child(process: subprocess.Popen[bytes]) -> None:
    """Do what Ctrl-C does to a process that ``start_apart`` has started in this console, if it is still running."""
    if os.name == "nt":
        process.send_signal(getattr(signal, "CTRL_BREAK_EVENT", signal.SIGTERM))  # Ctrl-C cannot be sent to one process
    else:
        process.send_signal(signal.SIGTERM if _ignores_interrupt(process.pid) else signal.SIGINT)


def interrupt_process(pid: int, is_right: Callable[[], bool]) -> bool:
    """Do what Ctrl-C does to any process of this user.

    Args:
        is_right: whether this is the process that is meant. Asked when its number cannot go to another one any more,
            where the system can hold it.

    Returns:
        False if it is not, or if it is not running. On Windows always: a process of another console cannot be reached.
    """
    if os.name == "nt":
        return False
    held = None
    with suppress(OSError, AttributeError):
        held = os.pidfd_open(pid)
    try:
        if not is_right():
            return False
        number = signal.SIGTERM if _ignores_interrupt(pid) else signal.SIGINT
        if held is None:
            os.kill(pid, number)
        else:
            signal.pidfd_send_signal(held, number)
        return True
    except (ProcessLookupError, PermissionError):
        return False
    finally:
        if held is not None:
            os.close(held)


def _ignores_interrupt(pid: int) -> bool:
    """Whether a process was started with SIGINT ignored, as a script's ``command &`` is."""
    with suppress(OSError, ValueError, IndexError):
        lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
        mask = next(line for line in lines if line.startswith("SigIgn:")).split()[1]
        return bool(int(mask, 16) >> (signal.SIGINT - 1) & 1)
    return False


def end_process(pid: int) -> None:
    """End a process at once, and those of its session where it leads one."""
    import psutil

    if hasattr(os, "killpg"):
        with suppress(OSError):
            if os.getpgid(pid) == pid:
                os.killpg(pid, signal.SIGKILL)
                return
    with suppress(psutil.Error):
        psutil.Process(pid).kill()


def end_with_children(process: subprocess.Popen[bytes]) -> None:
    """End a process that was started with ``start_new_session=True``, and what it started where that can be done."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def path_sockets() -> socket.AddressFamily | None:
    """The family of sockets that are files; None where there are none."""
    return getattr(socket, "AF_UNIX", None)


def is_heard(family: socket.AddressFamily, address: Any, seconds: float) -> bool:
    """Whether a process listens at an address. False only if it is sure that none does: some are slow, or far away."""
    with socket.socket(family) as asking:
        asking.settimeout(seconds)
        try:
            asking.connect(address)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True
    return True


def most_open_files() -> int | None:
    """How many files this process may have open; None where no such limit is set."""
    try:
        import resource
    except ImportError:
        return None
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return None if soft == resource.RLIM_INFINITY else soft


def available_ram() -> int:
    """Bytes of host memory that can be used without swapping. It knows no container's limit."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Bytes of this process that are in RAM, mapped files included."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def shared_threads(count: int, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variable that gives each of so many processes its share of the cores. None if the user set it.

    Without it each has a thread on every core, and they wait for each other.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {} if "OMP_NUM_THREADS" in env else {"OMP_NUM_THREADS": str(max(1, cores // count))}


@contextmanager
def on_one_core() -> Iterator[None]:
    """Run on one core until the end of the block, where a process can choose. What it was is restored."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores:
        os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def stand_in(path: Path, target: Path) -> None:
    """Make ``path`` another name of the file ``target``: a link, or a copy where there can be none.

    Windows allows symbolic links only to administrators and in its developer mode, and hard links on one disk.
    """
    for make in (path.symlink_to, path.hardlink_to):
        with suppress(OSError, NotImplementedError):
            make(target)
            return
    shutil.copyfile(target, path)
