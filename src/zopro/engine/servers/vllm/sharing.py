"""Servers that share a step: each takes displacements as it has room, and one that fails leaves its own to the others.

fleet = Fleet([Server(url) for url in urls])
results = fleet.share(count, prepare, work)      # work(server, thing) of each prepare(index), by whichever server

A result counts once: whoever was given an index last gives it, and what a server says after it was left out is thrown
away. A server that was left out is asked again from call to call, ever more rarely, and takes part when it answers.
"""

from __future__ import annotations

import itertools
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from zopro.engine.servers.vllm.client import Failed, OtherWeights, Server, in_background, together
from zopro.errors import InputError
from zopro.system.files import files_at_once

logger = logging.getLogger(__name__)

PATIENCE, SOONEST = 10.0, 30.0  # with others there, late is so many times the slowest yet, and at least so many seconds
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0  # seconds before a server that was left out is asked again
OTHER_FILES = 128  # that a process may have open beside its connections
TRIES = 2  # rounds in which all servers may fail within one call

T = TypeVar("T")
S = TypeVar("S")


@dataclass
class _Job:
    index: int
    server: Server
    begun: float


@dataclass
class _Absence:
    reason: str
    until: float  # of time.monotonic()


class Fleet:
    """Servers of one model.

    Args:
        timeout: seconds that a server may take for one displacement.
    """

    def __init__(self, servers: Sequence[Server], timeout: float = 600.0) -> None:
        self.servers, self.timeout = list(servers), timeout
        room = max(1, (files_at_once() - OTHER_FILES) // len(self.servers)) if self.servers else 0
        for server in self.servers:
            server.rows = min(server.rows, room)
        self._absent: dict[Server, _Absence] = {}
        self._pauses: dict[Server, float] = {}
        # Of all calls: a server may take longer to greet than one call lasts. Each job has a ticket of its own.
        self._said: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._guests: dict[int, Server] = {}
        self._tickets = itertools.count()

    def __deepcopy__(self, memo: dict[int, object]) -> Fleet:
        return self  # who is there is known once

    @property
    def up(self) -> list[Server]:
        """Those that take part."""
        return [server for server in self.servers if server not in self._absent]

    @property
    def slots(self) -> int:
        """Displacements that go together."""
        return sum(server.slots for server in self.up)

    def greet(self) -> None:
        """Ask all servers at once what they serve. Raises InputError: one is not there, or they differ."""

        def greeted(server: Server) -> str:
            try:
                server.greet()
            except Failed as error:
                return f"{server.url}: {error}"
            return ""

        if failures := list(filter(None, together([lambda s=s: greeted(s) for s in self.servers]))):  # type: ignore[misc]
            raise InputError(
                f"engine: every server must answer at the start, got {'; '.join(failures)}. Start it as docs/serving.md "
                "says, or take its address out."
            )

    def end(self) -> None:
        """Stop what was started for it."""
        for server in self.servers:
            server.stop()

    def share(
        self,
        count: int,
        prepare: Callable[[int], S],
        work: Callable[[Server, S], T],
        finish: Callable[[S], object] = lambda thing: None,
    ) -> list[T]:
        """work(server, prepare(index)) for each index below `count`.

        Args:
            prepare: called in this thread, once for each index, when a server is about to take it.
            work: called in threads, as many at a time for a server as it has slots. Raises Failed: the server has.
            finish: called in this thread with what was prepared, when its result is there.

        Raises InputError: no server is left.
        """
        waiting, things, results = deque(range(count)), dict[int, S](), dict[int, T]()
        jobs, guests = dict[int, _Job](), self._guests
        slowest, tries = 0.0, 0

        def start(call: Callable[[], Any]) -> int:
            ticket = next(self._tickets)
            in_background(ticket, call, self._said)
            return ticket

        def ask_again(servers: list[Server]) -> None:
            for server in servers:
                if server not in guests.values():
                    guests[start(server.greet)] = server

        def leave_out(server: Server, reason: str) -> None:
            lost = [ticket for ticket, job in jobs.items() if job.server is server]
            waiting.extendleft(jobs.pop(ticket).index for ticket in reversed(lost))
            self._leave_out(server, reason, len(lost))

        ask_again([server for server, absence in self._absent.items() if absence.until <= time.monotonic()])
        while len(results) < count:
            while waiting and (free := self._free(jobs)):
                index, server = waiting.popleft(), free[0]
                if index not in things:
                    things[index] = prepare(index)
                thing = things[index]
                jobs[start(lambda s=server, t=thing: work(s, t))] = _Job(index, server, time.monotonic())  # type: ignore[misc]
            if not jobs and not guests:
                if tries == TRIES:
                    raise self._nobody()
                tries += 1
                ask_again(self.servers)
            limit = self._limit(slowest)
            late = min((job.begun + limit for job in jobs.values()), default=time.monotonic() + self.timeout)
            try:
                ticket, outcome = self._said.get(timeout=max(0.0, late - time.monotonic()))
            except queue.Empty:
                for server in {job.server for job in jobs.values() if job.begun + limit <= time.monotonic()}:
                    leave_out(server, f"no answer within {limit:.3g} s")
                continue
            if ticket in guests:
                self._returned(guests.pop(ticket), outcome)
            elif ticket in jobs:
                job = jobs[ticket]
                if isinstance(outcome, Failed):
                    leave_out(job.server, str(outcome))
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    del jobs[ticket]
                    results[job.index] = outcome
                    finish(things.pop(job.index))
                    slowest = max(slowest, time.monotonic() - job.begun)
                    self._pauses.pop(job.server, None)
        return [results[index] for index in range(count)]

    def _free(self, jobs: dict[int, _Job]) -> list[Server]:
        """Servers with room, the one with least to do first."""
        load = {server: sum(job.server is server for job in jobs.values()) for server in self.up}
        return sorted((server for server in load if load[server] < server.slots), key=load.__getitem__)

    def _limit(self, slowest: float) -> float:
        """Seconds after which a server is late."""
        others = len(self.up) > 1 and slowest > 0
        return min(self.timeout, max(SOONEST, PATIENCE * slowest)) if others else self.timeout

    def _leave_out(self, server: Server, reason: str, lost: int) -> None:
        self._stay_away(server, reason)
        what = "displacement is" if lost == 1 else f"{lost} displacements are"
        logger.warning("engine: %s is left out (%s); its %s asked for again", server.url, reason, what)

    def _returned(self, server: Server, outcome: object) -> None:
        if isinstance(outcome, Failed):
            known = self._absent.get(server)
            first = None if isinstance(outcome, OtherWeights) else known
            self._stay_away(server, first.reason if first else str(outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        elif self._absent.pop(server, None):
            logger.warning("engine: %s is back", server.url)

    def _stay_away(self, server: Server, reason: str) -> None:
        pause = self._pauses.get(server, FIRST_PAUSE)
        self._absent[server] = _Absence(reason, time.monotonic() + pause)
        self._pauses[server] = min(2 * pause, LONGEST_PAUSE)

    def _nobody(self) -> InputError:
        reasons = "; ".join(f"{server.url}: {absence.reason}" for server, absence in self._absent.items())
        return InputError(
            f"engine: at least one server must answer, got {reasons}. Start one as docs/serving.md says; a run that "
            "had begun continues with --resume."
        )
