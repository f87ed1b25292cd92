"""``--gpus N``: a process for each GPU, who has the terminal, what becomes of a signal, and how the whole ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from k5cache.shared.errors import K5Error
from k5train.parallel import launch as launching
from tests.ranks import ROOT

SCRIPT = """
import os, sys, time
rank = int(os.environ["RANK"])
print("out", rank, flush=True)
print("err", rank, file=sys.stderr, flush=True)
if rank == 1:
    os.kill(os.getpid(), 9)
time.sleep(0.5)
sys.exit(2)
"""


def test_gpus_starts_a_process_each_of_which_the_first_has_the_terminal(capfd, monkeypatch):
    assert launching.launch([sys.executable, "-S", "-c", SCRIPT], 2) == 2
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert "err 0" in err
    assert "rank 1: err 1" in err
    script = SCRIPT.replace("rank == 1", "rank == 0")
    with pytest.raises(K5Error, match="Rank 0 was ended by SIGKILL"):
        launching.launch([sys.executable, "-S", "-c", script], 2)
    assert launching.launch([sys.executable, "-S", "-c", "pass"], 2) == 0
    # One that does not end by itself, after another one failed, is ended.
    monkeypatch.setattr(launching, "PATIENCE", 0.3)
    monkeypatch.setattr(launching, "MORE_PATIENCE", 0.3)
    waits = "import os, time; os.environ['RANK'] == '1' and os._exit(1); time.sleep(60)"
    monkeypatch.setattr(launching, "PATIENCE_TO_SPEAK", 0.1)
    with pytest.raises(K5Error, match="Rank 0 was ended by SIGINT"):
        launching.launch([sys.executable, "-S", "-c", waits], 2)
    said = capfd.readouterr().err.partition("rank 1 ended with exit code 2\n")[2]
    assert "rank 1 ended with exit code 1\nwarning: Rank 0 (process " in said
    assert said.count("rank 1 ended") == 1
    deaf = f"import signal; [signal.signal(number, signal.SIG_IGN) for number in (2, 15)]; {waits}"
    with pytest.raises(K5Error, match="Rank 0 did not end when it was asked to, and was killed, and with it the run"):
        launching.launch([sys.executable, "-S", "-c", deaf], 2)
    # With the first one the run has ended, also if another one hangs.
    monkeypatch.setattr(launching, "PATIENCE_WITH_THE_REST", 0.3)
    hangs = "import os, signal, sys; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGSTOP); sys.exit(2)"
    assert launching.launch([sys.executable, "-S", "-c", hangs], 2) == 2


def test_a_process_that_dies_after_the_first_one_has_finished_makes_an_error_of_the_whole(capfd):
    script = "import os, sys; sys.exit(sys.stderr.write('of a library\\n') and 3 if os.environ['RANK'] == '1' else 0)"
    with pytest.raises(K5Error, match="finished the run, whose files are whole, but rank 1 ended with exit code 3"):
        launching.launch([sys.executable, "-S", "-c", script], 2)
    assert "rank 1: of a library\nrank 1 ended with exit code 3\n" in capfd.readouterr().err


def test_a_first_process_that_is_stopped_because_another_one_died_makes_an_error_of_the_whole(monkeypatch):
    monkeypatch.setattr(launching, "PATIENCE", 0.1)
    waits = (
        "import os, signal, sys, time; signal.signal(2, lambda *_: sys.exit(130)); "
        "os.environ['RANK'] == '1' and (time.sleep(0.5), os._exit(1)); time.sleep(60)"
    )
    with pytest.raises(K5Error, match="The run was stopped because rank 1 ended with exit code 1"):
        launching.launch([sys.executable, "-S", "-c", waits], 2)


SLOW_TO_STOP = '''
import os, signal, sys
from k5cache.shared import interrupt
from k5train.parallel.launch import launch
sleeps = """
import os, signal, sys, threading, time
signals = []
signal.signal(15, lambda *_: signals.append(15))
signal.signal(2, lambda *_: signals.append(2))
if os.environ["RANK"] == "1":
    sys.exit(0)
print(os.getpid(), flush=True)
while not signals:
    time.sleep(0.01)
print("asked", flush=True)
print(sys.stdin.readline().strip(), signals, flush=True)
while True:
    time.sleep(60)
"""
with interrupt.installed():
    launch([sys.executable, "-S", "-c", sleeps], 2)
'''


def test_the_first_signal_to_the_launcher_asks_its_processes_the_second_hurries_them_and_the_third_ends_them(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", SLOW_TO_STOP], stdout=pipe, stderr=pipe, cwd=tmp_path, env=env)
    assert process.stdout
    assert process.stdout.readline()
    process.terminate()
    assert process.stdout.readline() == b"asked\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"hurry [2]\n"  # the second one is no signal, which it would take for the first
    process.terminate()
    assert (
        b"KeyboardInterrupt: Stopped at once. A state that was saved before stays" in process.communicate(timeout=30)[1]
    )


IGNORING = '''
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
from k5cache.shared import interrupt
from k5train.parallel.launch import launch
sleeps = """
import os, signal, sys, time
signal.signal(15, lambda *_: sys.exit(7))
if os.environ["RANK"] == "1":
    open("there", "x").close()
while not os.path.exists("there"):
    time.sleep(0.01)
print(flush=True)
time.sleep(60)
"""
with interrupt.installed():
    sys.exit(launch([sys.executable, "-S", "-c", sleeps], 2))
'''


def test_what_a_script_started_in_the_background_stops_at_sigterm(tmp_path):
    """A shell's ``command &`` ignores Ctrl-C, and so do the processes that it starts."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", IGNORING], stdout=subprocess.PIPE, cwd=tmp_path, env=env)
    assert process.stdout
    assert process.stdout.readline() == b"\n"  # both are there
    process.terminate()
    assert process.communicate(timeout=30)[0] == b""
    assert process.returncode == 7
