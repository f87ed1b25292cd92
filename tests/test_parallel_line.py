"""The sockets between the processes of a run, without any process: what is said, and when the other one is given up."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import pytest

from k5cache.shared import interrupt
from k5train.parallel import line as of_line
from k5train.parallel.channel import Channel, accept, call, listen
from k5train.parallel.line import DONE, FAILED, SILENT, STOPPED, Line, Pulse
from k5train.parallel.ranks import RankLost
from k5train.parallel.together import Together
from k5train.parallel.world import World


class Pair:
    """The lines of two processes to each other."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.pulse, self.other_pulse = Pulse(), Pulse()
        self.here, self.there = Line(ours, "Rank 1", self.pulse), Line(theirs, "Rank 0", self.other_pulse)

    def close(self) -> None:
        self.here.socket.close()
        self.there.socket.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    lines = Pair()
    yield lines
    lines.close()


def test_messages_of_any_size_come_whole_and_in_order_with_signs_of_life_between_them(pair):
    large = bytes(range(256)) * 40_000  # far more than a socket holds
    sender = threading.Thread(target=lambda: [pair.there.send(large), pair.there.beat(), pair.there.send(b"")])
    sender.start()
    assert pair.here.receive() == large
    assert pair.here.receive() == b""
    sender.join()
    pair.here.check()


def test_a_process_that_gives_no_sign_of_life_is_given_up_after_a_minute_and_one_that_does_is_not(pair, monkeypatch):
    pair.pulse.beats += SILENT - 1
    pair.here.check()
    pair.there.beat()
    pair.here.check()
    pair.pulse.beats += SILENT - 1
    pair.here.check()
    pair.pulse.beats += 1
    with pytest.raises(RankLost, match="Rank 1 hangs: it has given no sign of life for 60 s"):
        pair.here.check()
    monkeypatch.setattr(of_line, "BEAT", 0.01)
    for ask in (pair.here.receive, lambda: pair.here.send(bytes(10_000_000))):
        with pytest.raises(RankLost, match="Rank 1 hangs"):
            ask()


def test_a_process_says_how_it_ends_after_its_last_message_and_whoever_says_nothing_was_killed():
    for kind, error, words in (
        (FAILED, RankLost, "Rank 1: the disk is full"),
        (STOPPED, KeyboardInterrupt, None),
        (DONE, RankLost, "Rank 1 ended before the others"),
        (None, RankLost, "Rank 1 ended without a word"),
    ):
        pair = Pair()
        pair.there.send(b"last")
        if kind:
            pair.there.end({"kind": kind, "problem": "the disk is full", "fix": "free some"})
        pair.there.socket.close()
        pair.here.check()  # there is a message left
        assert pair.here.receive() == b"last"
        for ask in (pair.here.check, pair.here.receive, lambda pair=pair: pair.here.send(b"x" * 10_000_000)):
            with pytest.raises(error, match=words):
                ask()
        pair.close()


def test_what_a_process_said_before_it_ended_is_heard_however_late(pair):
    pair.there.send(b"last")
    pair.there.end({"kind": FAILED, "problem": "the disk is full", "fix": "free some"})
    pair.there.check()  # it can still hear the others, of which none has ended
    pair.here.check()
    pair.pulse.beats += 10 * SILENT
    pair.here.check()
    assert pair.here.receive() == b"last"
    with pytest.raises(RankLost, match="Rank 1: the disk is full"):
        pair.here.check()


def test_who_has_come_hears_signs_of_life_while_the_first_process_waits_for_the_others(monkeypatch):
    monkeypatch.setattr(of_line, "BEAT", 0.01)
    listener, port, word = listen("127.0.0.1")
    arrived: list[Channel] = []
    waits = threading.Thread(target=lambda: arrived.append(accept(listener, word, 3, 60)))
    waits.start()
    channels = [call("127.0.0.1", port, word, 1, 3, 1, 60)]
    assert select.select([channels[0].lines[0].socket], [], [], 30)[0]
    assert not arrived
    channels.append(call("127.0.0.1", port, word, 2, 3, 2, 60))
    waits.join()
    for channel in (*arrived, *channels):
        channel.end(DONE)
        for line in channel.lines.values():
            line.socket.close()


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([(5, 8)], r"Rank 5 \(process 7 on .*\) is one of 8, and rank 0 waits for 3 processes"),
        ([(1, 8)], "is one of 8, and rank 0 waits for 3"),
        ([(1, 3), (1, 3)], "has come, and so has another rank of this number, and rank 0 waits for 3"),
    ],
)
def test_a_process_of_other_ones_is_refused(others, said):
    listener, port, word = listen("127.0.0.1")
    called = [
        threading.Thread(
            target=lambda rank=rank, size=size: channels.append(call("127.0.0.1", port, word, rank, size, 7, 60))
        )
        for rank, size in others
    ]
    channels: list[Channel] = []
    for thread in called:
        thread.start()
    with pytest.raises(RankLost, match=said):
        accept(listener, word, 3, 60)
    for thread in called:
        thread.join()
    for channel in channels:  # they were told, and say nothing themselves
        with pytest.raises(RankLost, match=said) as lost:
            channel.wait_for_news(60)
        assert lost.value.is_told
        channel.end(DONE)
        channel.lines[0].socket.close()


def test_a_sum_waits_half_an_hour_in_which_the_process_was_running(pair):
    together = Together(World(0, 2, 0, 2), Channel(0, 2, {1: pair.here}, pair.pulse), None)

    def is_done() -> bool:
        pair.other_pulse.place = 1
        pair.there.beat()
        pair.pulse.beats += SILENT - 1
        return False

    together.channel.pulse.place = 2
    with pytest.raises(RankLost, match="Rank 1 lives, but the others have waited for it for 30 min"):
        together._until(is_done)
    assert 1800 < pair.pulse.beats < 1900
    together.channel.end(DONE)


def test_a_message_that_a_second_ctrl_c_cuts_is_followed_by_nothing(pair, monkeypatch):
    def twice(*arguments: object, **options: object) -> None:
        assert not interrupt.is_pending()
        interrupt._on_signal(2, None)  # the first one waits
        interrupt._on_signal(2, None)

    monkeypatch.setattr(of_line, "wait_for", twice)
    with pytest.raises(KeyboardInterrupt):
        pair.there.send(bytes(10_000_000))
    monkeypatch.undo()
    pair.there.beat()
    pair.there.end({"kind": STOPPED, "problem": "", "fix": ""})
    with pytest.raises(RankLost, match="ended without a word"):
        pair.here.receive()


def test_a_channel_beats_by_itself_and_says_how_many_sums_its_process_has_begun(pair, monkeypatch):
    monkeypatch.setattr(of_line, "BEAT", 0.01)
    here, there = Channel(0, 2, {1: pair.here}, pair.pulse), Channel(1, 2, {0: pair.there}, pair.other_pulse)
    here.pulse.place = 3
    there.pulse.place = 2
    while pair.here.place != 2:
        select.select([pair.here.socket], [], [], 10)
        here.check()
    assert here.behind() == "Rank 1"
    there.pulse.place = 3
    while pair.here.place != 3:
        select.select([pair.here.socket], [], [], 10)
        here.check()
    assert here.behind() == ""
    there.end(FAILED, "of a bug", "mend it")
    with pytest.raises(RankLost, match="Rank 1: of a bug") as lost:
        here.collect(b"")
    assert lost.value.is_told
    here.end(DONE)
