"""A GPU that is not the first, asked without one: it becomes the current one, and its own work is waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from k5cache.encoders import hostio
from k5cache.shared.device import pick_device
from k5cache.shared.errors import K5Error


@pytest.fixture
def two(monkeypatch) -> list[Any]:
    """Two GPUs that are not there. The list has those that were made the current one."""
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


def test_a_gpu_that_is_named_by_its_number_becomes_the_current_one(two):
    assert [pick_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert two == []
    assert pick_device("cuda:1") == "cuda:1"
    assert two == ["cuda:1"]
    with pytest.raises(K5Error, match="there are 2 GPUs"):
        pick_device("cuda:2")
    assert two == ["cuda:1"]


def test_an_event_is_recorded_where_the_copy_was_queued(monkeypatch):
    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: str) -> None:
            self.stream = stream

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: f"the stream of {device}")
    assert hostio.record_event(torch.device("cuda:1")).stream == "the stream of cuda:1"
