"""Seconds and peak memory of a run over all the processes that have worked on it: RUN/usage.json.

The file has an entry for each process that began or continued the run. It is written at the end of a stage, and every few
seconds while a stage logs, so a process that is killed leaves its numbers up to then.

    usage = Usage(Path("RUN/usage.json"))
    with usage.stage("sft", None) as spent:
        ...
    spent()             # seconds of this stage, those of a process that crashed in it included
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zopro.errors import InputError
from zopro.store.durable import write_text
from zopro.system.memory import peak_rss_mb
from zopro.system.ranks import launched

Entry = dict[str, Any]
NOTED_EVERY = 2.0  # seconds


class Usage:
    """What this process uses, and what others before it have used.

    Args:
        path: the file.
        began: when the work of this process began, by `time.perf_counter()`; by default now.
    """

    def __init__(self, path: Path, began: float | None = None) -> None:
        self.path = path
        self.earlier: list[Entry] = []
        self._began = time.perf_counter() if began is None else began
        self._noted: float | None = None  # when the file was last written; None: by this process not yet, or no more
        self._stage: tuple[str, int | None, float] | None = None

    def go_on(self, metrics: Sequence[Mapping[str, Any]]) -> None:
        """Take over what the file says of earlier processes.

        Where there is none, as in runs of earlier versions, the ended stages in `metrics` are one entry. Raises
        InputError: the file is damaged.
        """
        if self.path.exists():
            try:
                self.earlier = _entries(json.loads(self.path.read_text(encoding="utf-8")))
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{self.path}: must be JSON, but is damaged ({error}). Delete it: what the finished stages took is "
                    "known without it."
                ) from None
        elif ends := [line for line in metrics if line.get("event") == "end"]:
            seconds = round(sum(line["seconds"] for line in ends), 3)
            self.earlier = [{"seconds": seconds, "peak_rss_mb": max(line["peak_rss_mb"] for line in ends)}]

    def peak_rss_mb(self) -> float:
        """The largest resident memory that any process of the run has had so far, in MB (1e6 bytes)."""
        peak: float = max(entry["peak_rss_mb"] for entry in self.entries())
        return peak

    @contextmanager
    def stage(self, name: str, iteration: int | None) -> Iterator[Callable[[], float]]:
        """Time a stage; gives its seconds so far, with those of processes that ended in the middle of it."""
        start = time.perf_counter()
        before = self.unfinished(name, iteration)
        self._stage = name, iteration, start
        yield lambda: round(before + time.perf_counter() - start, 3)
        self._stage = None  # not where an error ends the process: `close` writes that it was in this stage

    def unfinished(self, name: str, iteration: int | None) -> float:
        """Seconds in a stage of earlier processes that ended in the middle of it."""
        crashed = [entry.get("unfinished") or {} for entry in self.earlier]
        return sum((d["seconds"] for d in crashed if (d.get("stage"), d.get("iteration")) == (name, iteration)), 0.0)

    def begin(self) -> None:
        """From now on `note` writes: this process works on the run."""
        self._noted = time.perf_counter()
        write_text(self.path, json.dumps(self.entries()))

    def note(self, every: float = 0.0) -> None:
        """Write the file, unless it was written in the last `every` seconds."""
        if self._noted is not None and time.perf_counter() - self._noted >= every:
            self.begin()

    def close(self) -> list[Entry]:
        """The last note, if this process has begun; what is done after it does not count."""
        entries = self.entries()
        if self._noted is not None:
            write_text(self.path, json.dumps(entries))
        self._noted = None
        return entries

    def entries(self) -> list[Entry]:
        """One for each process, this one last: seconds, peak_rss_mb, processes (ranks), and a stage it is in."""
        now = time.perf_counter()
        here: Entry = {
            "seconds": round(now - self._began, 3),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "processes": launched(),
        }
        if self._stage is not None:
            name, iteration, start = self._stage
            here["unfinished"] = {"stage": name, "iteration": iteration, "seconds": round(now - start, 3)}
        return [*self.earlier, here]


def _entries(values: Any) -> list[Entry]:
    """What the file holds, if it is entries. Raises ValueError."""
    entries: list[Entry] = values if isinstance(values, list) else [{}]
    for entry in entries:
        stage = isinstance(entry, dict) and (entry.get("unfinished") or {"seconds": 0})
        if not isinstance(stage, dict) or not numbers(stage, "seconds") or not numbers(entry, "seconds", "peak_rss_mb"):
            raise ValueError("no list of attempts with their seconds and peak_rss_mb")
    return entries


def numbers(record: Mapping[str, Any], *names: str) -> bool:
    """Whether the record has a number under each name."""
    return all(isinstance(record.get(name), (int, float)) for name in names)
