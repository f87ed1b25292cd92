"""Errors of the disk become sentences with a path, also those that a library has wrapped."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path

import pytest

from k5cache.shared import console
from k5cache.shared.disk_errors import named, sentence

PATH = Path("runs/cats/adapter.safetensors")


def raised_inside_named(error: Exception) -> BaseException:
    with pytest.raises(type(error) if not str(error).startswith("library") else OSError) as caught, named(PATH):
        raise error
    return caught.value


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENOENT])
def test_an_error_without_a_path_gets_it(number):
    for error in (
        OSError(number, os.strerror(number)),
        RuntimeError(f"library: I/O error: {os.strerror(number)} (os error {number})"),  # as safetensors says it
        RuntimeError(f"library: [errno {number}] it failed"),  # as pyarrow says it
    ):
        answer = sentence(raised_inside_named(error))
        assert answer is not None
        assert answer[0].endswith(f" {PATH}")


def test_a_path_that_an_error_has_stays_and_a_bare_name_does_not():
    for name, shown in (("runs/other.bin", "runs/other.bin"), ("other.bin", str(PATH))):
        answer = sentence(raised_inside_named(OSError(errno.EIO, "Input/output error", name)))
        assert answer is not None
        assert answer[0].endswith(f" {shown}")


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EMFILE, "Too many files are open, the next would be"),
        (errno.ENOENT, "There is no longer a file or folder"),
        (None, "The disk reports an error for"),  # it failed once
    ],
)
def test_what_safetensors_calls_no_such_file_has_its_true_reason(tmp_path, monkeypatch, number, words):
    path = tmp_path / "adapter.safetensors"
    path.touch()

    def cannot_open(*args: object) -> None:
        raise OSError(number, os.strerror(number), str(path))

    if number is not None:
        monkeypatch.setattr(io, "open", cannot_open)
    error = FileNotFoundError(f"No such file or directory: {path}")
    assert sentence(error)[0] == f"{words} {path}"  # raised by a library that loads a model
    with pytest.raises(OSError, match="adapter") as caught, named(path):
        raise error
    assert sentence(caught.value)[0] == f"{words} {path}"


def test_an_error_of_reading_names_the_path_that_was_read(tmp_path, monkeypatch):
    """Python gives an error of ``open`` the path, and one of ``read`` none."""
    path = tmp_path / "metrics.jsonl"
    path.touch()

    class Broken(io.BytesIO):
        def read(self, *args: int) -> bytes:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(io, "open", lambda *args: Broken())

    def read_it(path: Path) -> None:
        somewhere_else = Path("elsewhere")
        assert somewhere_else
        path.read_bytes()

    with pytest.raises(OSError, match="Input/output error") as caught:
        read_it(path)
    answer = sentence(caught.value)
    assert answer is not None
    assert answer[0] == f"The disk reports an error for {path}"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EIO, "The disk reports an error"),
        (errno.ENOSPC, "The disk is full"),
        (errno.EMFILE, "Too many files are open"),
        (errno.EROFS, "The disk is read-only"),
    ],
)
def test_without_any_path_the_sentence_is_whole(number, words):
    answer = sentence(OSError(number, os.strerror(number)))
    assert answer is not None
    assert answer[0] == words


def test_what_is_no_error_of_the_disk_rises_as_it_is():
    for error in (ValueError("a bug"), OSError("image file is truncated"), KeyError("x")):
        assert raised_inside_named(error) is error
        assert sentence(error) is None


def test_a_command_ends_with_the_sentence(capsys):
    def app() -> None:
        with named(PATH), Path("/dev/full").open("wb", buffering=0) as full:
            full.write(b"x")

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(SystemExit) as ended:
        console.run(app)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: The disk is full while writing {PATH}\n")


def test_a_bug_keeps_its_traceback():
    def app() -> None:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        console.run(app)
