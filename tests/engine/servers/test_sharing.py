"""Servers that share a step: whoever is free works, whoever fails is left out, and everything counts once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from zopro.engine.servers.vllm import sharing
from zopro.engine.servers.vllm.client import Failed
from zopro.engine.servers.vllm.sharing import Fleet
from zopro.errors import InputError


class Fake:
    """A server that does what its `act` says with a displacement, and greets as `here` says."""

    slots, rows = 2, 4

    def __init__(self, name: str, act: Callable[[int], Any] | None = None) -> None:
        self.url, self.act, self.here, self.did = name, act or (lambda index: f"{index} by {name}"), True, list[int]()
        self.lock = threading.Lock()

    def greet(self) -> None:
        if not self.here:
            raise Failed("refused")

    def work(self, index: int) -> Any:
        with self.lock:
            self.did.append(index)
        return self.act(index)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "FIRST_PAUSE", 0.0)


def shared(servers: list[Fake], count: int, **options: Any) -> list[Any]:
    fleet = Fleet(servers, **options)  # type: ignore[arg-type]
    return fleet.share(count, lambda index: index, Fake.work)  # type: ignore[arg-type]


def fail(index: int) -> None:
    raise Failed("ConnectionResetError")


def test_results_come_in_order_and_both_work() -> None:
    meet = threading.Barrier(4, timeout=20)  # passed only if two at each server are under way at once

    def act(index: int) -> int:
        meet.wait()
        return index * index

    servers = [Fake("a", act), Fake("b", act)]
    assert shared(servers, 8) == [index**2 for index in range(8)]
    assert sorted([*servers[0].did, *servers[1].did]) == list(range(8)) and len(servers[0].did) == 4


def test_a_server_that_dies_leaves_its_share_to_the_other(caplog: pytest.LogCaptureFixture) -> None:
    killed = threading.Event()

    def dies(index: int) -> str:
        if index >= 2:  # after its first two
            killed.set()
            fail(index)
        return f"{index} by dying"

    def waits(index: int) -> str:
        assert killed.wait(20)
        return f"{index} by living"

    dying, living = Fake("dying", dies), Fake("living", waits)
    dying.here = False
    with caplog.at_level(logging.WARNING):
        found = shared([dying, living], 8)
    assert [text.split()[0] for text in found] == [str(index) for index in range(8)]
    by_dying = [index for index, text in enumerate(found) if text.endswith("dying")]
    assert 1 <= len(by_dying) <= 2 and sorted(living.did) == [i for i in range(8) if i not in by_dying]
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("engine: dying is left out (ConnectionResetError)")


@pytest.fixture
def stalled() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def test_one_that_stalls_is_late_and_what_it_says_then_is_thrown_away(
    stalled: threading.Event, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sharing, "SOONEST", 1.0)
    monkeypatch.setattr(sharing, "PATIENCE", 0.0)
    said = threading.Semaphore(0)

    def stalls(index: int) -> str:
        stalled.wait(20)
        said.release()
        return "too late"

    slow, quick = Fake("slow", stalls), Fake("quick")
    slow.here = False

    def late(index: int) -> str:
        if index == 2:  # one of those it had: meanwhile the stalled one speaks up
            stalled.set()
            assert said.acquire(timeout=20) and said.acquire(timeout=20)
        return f"{index} by quick"

    quick.act = late
    found = shared([slow, quick], 6)
    assert found == [f"{index} by quick" for index in range(6)] and sorted(quick.did) == list(range(6))
    assert "slow is left out (no answer within 1 s); its 2 displacements are asked for again" in caplog.text


def test_an_only_server_may_take_the_time_it_was_given(stalled: threading.Event) -> None:
    slow = Fake("slow", lambda index: stalled.wait(20) and None)
    slow.here = False
    with pytest.raises(InputError, match=r"at least one server must answer, got slow: no answer within 0\.1 s"):
        shared([slow], 1, timeout=0.1)


def test_one_that_is_back_takes_part_again(caplog: pytest.LogCaptureFixture) -> None:
    first, second = Fake("first", fail), Fake("second")
    first.here = False
    fleet = Fleet([first, second])  # type: ignore[list-item]
    assert fleet.share(3, lambda index: index, Fake.work) == [f"{index} by second" for index in range(3)]  # type: ignore[arg-type]
    assert fleet.up == [second]
    first.here, first.act = True, lambda index: f"{index} by first"
    back, meet = threading.Event(), fleet._returned
    fleet._returned = lambda *said: (meet(*said), back.set())  # type: ignore[assignment, func-returns-value]
    second.act = lambda index: back.wait(20) and f"{index} by second"  # so that there is work when it is back
    found = fleet.share(6, lambda index: index, Fake.work)  # type: ignore[arg-type]
    assert {text.split()[-1] for text in found} == {"first", "second"}
    assert [text.split()[0] for text in found] == [str(index) for index in range(6)]
    assert "engine: first is back" in caplog.text


def test_one_that_takes_longer_than_a_call_to_greet_is_asked_once_and_comes_back(stalled: threading.Event) -> None:
    slow, quick = Fake("slow", fail), Fake("quick")
    greetings = list[int]()

    def greet() -> None:
        greetings.append(1)
        assert stalled.wait(20)

    slow.greet = greet  # type: ignore[method-assign]
    fleet = Fleet([slow, quick])  # type: ignore[list-item]
    for _ in range(4):
        fleet.share(2, lambda index: index, Fake.work)  # type: ignore[arg-type]
    assert len(greetings) == 1 and fleet.up == [quick]
    slow.act = lambda index: f"{index} by slow"
    back, meet = threading.Event(), fleet._returned
    fleet._returned = lambda *said: (meet(*said), back.set())  # type: ignore[assignment, func-returns-value]
    stalled.set()
    quick.act = lambda index: back.wait(20) and f"{index} by quick"
    fleet.share(4, lambda index: index, Fake.work)  # type: ignore[arg-type]
    assert fleet.up == [slow, quick]


def test_pauses_grow_for_one_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "FIRST_PAUSE", 8.0)
    gone, there = Fake("gone", fail), Fake("there")
    fleet = Fleet([gone, there])  # type: ignore[list-item]
    fleet._stay_away(gone, "x")  # type: ignore[arg-type]
    first = fleet._pauses[gone]  # type: ignore[index]
    fleet._stay_away(gone, "x")  # type: ignore[arg-type]
    assert (first, fleet._pauses[gone]) == (16.0, 32.0)  # type: ignore[index]
    assert fleet.share(2, lambda index: index, Fake.work) == ["0 by there", "1 by there"]  # type: ignore[arg-type]
    assert not gone.did


def test_a_failure_that_passes_costs_one_more_try_and_one_that_stays_ends_the_call() -> None:
    tries = list[int]()

    def once(index: int) -> str:
        tries.append(index)
        return fail(index) if len(tries) == 1 else "done"  # type: ignore[func-returns-value]

    assert shared([Fake("a", once)], 1) == ["done"]
    with pytest.raises(InputError, match=r"got a: ConnectionResetError; b: ConnectionResetError\. .* with --resume"):
        shared([Fake("a", fail), Fake("b", fail)], 3)


def test_no_more_is_prepared_than_is_under_way() -> None:
    there, most = set[int](), list[int]()

    def prepare(index: int) -> int:
        there.add(index)
        most.append(len(there))
        return index

    Fleet([Fake("a")]).share(9, prepare, Fake.work, there.remove)  # type: ignore[arg-type, list-item]
    assert max(most) == Fake.slots and not there


def test_an_error_of_our_own_is_not_a_servers() -> None:
    def wrong(index: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        shared([Fake("a", wrong)], 1)


def test_all_must_be_there_at_the_start() -> None:
    away = Fake("away")
    away.here = False
    with pytest.raises(InputError, match=r"every server must answer at the start, got away: refused"):
        Fleet([Fake("a"), away]).greet()  # type: ignore[list-item]
