"""How xsep.measuring times a GPU, without one: what the card is asked for, in which order."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from xsep import measuring


class Card:
    """Runs what is enqueued only once the host waits, and notes it; by a clock of its own."""

    def __init__(self) -> None:
        self.queue: list[str] = []
        self.waits: list[list[str]] = []
        self.seconds = 0.0

    def wait(self) -> None:
        self.seconds += 1e-4 * self.queue.count("flush")
        self.waits.append(self.queue)
        self.queue = []


class Event:
    def __init__(self, card: Card, at: Iterator[int]) -> None:
        self.card, self.at = card, at

    def record(self) -> None:
        self.card.queue.append("event")
        self.time = next(self.at)

    def elapsed_time(self, other: Event) -> float:
        return float(other.time - self.time)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made, clock = Card(), iter(range(10**6))

    class Flush:
        def zero_(self) -> None:
            made.queue.append("flush")

    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=lambda: made.seconds))
    monkeypatch.setattr(torch, "empty", lambda *size, **options: Flush())
    monkeypatch.setattr(torch.cuda, "synchronize", made.wait)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(made, clock))
    return made


def test_the_card_is_kept_busy_until_a_call_is_enqueued(card: Card) -> None:
    def call(name: str) -> None:
        card.seconds += 1.05e-3  # the host's work: as long as ten flushes and a half
        card.queue.append(name)

    calls: Any = {name: functools.partial(call, name) for name in ("a", "b")}
    times = measuring._timed_on_gpu(calls, measuring.Effort(3, 0.0))
    assert times == {"a": 1e3, "b": 1e3}
    rounds = [wait for wait in card.waits if "event" in wait]
    assert len(rounds) == 3
    for taken in rounds:
        one = ["flush"] * 32  # three times as long as the host needs, and one more
        assert taken == [*one, "event", "a", "event", *one, "event", "b", "event"]


def test_a_call_without_a_host_to_wait_for_is_flushed_for_once(card: Card) -> None:
    measuring._timed_on_gpu({"a": lambda: card.queue.append("a")}, measuring.Effort(1, 0.0))
    assert card.waits[-1] == ["flush", "event", "a", "event"]


def test_more_rounds_until_the_seconds_are_over() -> None:
    assert len(list(measuring._rounds(measuring.Effort(5, 0.0)))) == 5
    assert len(list(measuring._rounds(measuring.Effort(2, 60.0)))) == 40
