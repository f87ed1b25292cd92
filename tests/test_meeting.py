"""How the processes of a run find each other, and what is said if they do not. Each of these is one process alone."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress

import pytest

from k5cache.shared.errors import RunError
from k5train.parallel import meeting
from k5train.parallel.meeting import NoAnswer, in_thread, meet
from k5train.parallel.world import World

FIRST, OTHER = World(0, 2, 0, 2), World(1, 2, 1, 2)


@pytest.fixture
def another_program(monkeypatch):
    """``another_program(answer)``: has a port, answers so, and returns the port's number."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as connections:

        def serve(answer: bytes) -> None:
            with suppress(OSError):
                while True:
                    connection = connections.enter_context(listener.accept()[0])
                    with suppress(OSError):
                        connection.sendall(answer)

        def begin(answer: bytes) -> int:
            thread = threading.Thread(target=serve, args=[answer], daemon=True)
            thread.start()
            connections.callback(thread.join)
            connections.callback(listener.shutdown, socket.SHUT_RDWR)
            port = listener.getsockname()[1]
            monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
            monkeypatch.setenv("MASTER_PORT", str(port))
            return port

        yield begin


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"])
def test_a_port_that_another_program_has_is_named_by_each_process(another_program, monkeypatch, answer):
    port = another_program(answer)
    monkeypatch.setattr(meeting, "SECONDS_TO_ANSWER", 0.2)
    with pytest.raises(RunError, match=rf"^Port {port} of 127.0.0.1 is taken\. The 2 processes") as taken:
        meet(FIRST)
    assert "--master-port" in str(taken.value)
    with pytest.raises(RunError, match=f"^Port {port} of 127.0.0.1 answers, but not as the first process would"):
        meet(OTHER)


def test_who_does_not_come_is_named(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.setattr(meeting, "SECONDS_TO_COME", 0.3)
    monkeypatch.setattr(meeting, "SECONDS_TO_ANSWER", 0.2)
    with pytest.raises(RunError, match="Of the 2 processes of this run, rank 1 did not come"):
        meet(FIRST)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(RunError, match=r"did not find each other at 127\.0\.0\.1, port 1: .*refused"):
        meet(OTHER)


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "-1"])
def test_a_place_that_is_none_is_said(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(RunError, match=rf"MASTER_PORT={port or '.unset.'} are not where the processes find each other"):
        meet(OTHER)


def test_ctrl_c_ends_a_call_that_answers_no_signal():
    never = threading.Event()

    def call(before: Callable[[], object]) -> object:
        before()
        return never.wait()

    with pytest.raises(KeyboardInterrupt):
        in_thread(lambda: call(lambda: os.kill(os.getpid(), signal.SIGINT)), 60)
    with pytest.raises(NoAnswer):
        in_thread(lambda: call(lambda: None), 0.1)
    with pytest.raises(KeyError):
        in_thread(lambda: {}["of the call"], 60)
    assert in_thread(lambda: 7, 60) == 7
    never.set()
