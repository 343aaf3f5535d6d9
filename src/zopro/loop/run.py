"""One run in progress: its configuration, its directory and its processes. The first of three that a stage is given."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.config.heeded import rates
from zopro.store.rundir import RunDirectory
from zopro.system import progress
from zopro.system.launch import Processes
from zopro.system.random_state import derived_seed
from zopro.train.callbacks import MetricsCallback, SnapshotCallback, check_reports
from zopro.train.checkpoints import newest


@dataclass(frozen=True)
class Run:
    """What a stage reads its settings from and writes its output to.

    store: the run directory. processes: those that work on the run; only the first one writes.
    """

    config: RunConfig
    store: RunDirectory
    processes: Processes
    _bars: ExitStack = field(default_factory=ExitStack, repr=False)

    def say(self, line: str) -> None:
        """One line on stderr."""
        progress.say(line)

    def say_unheeded(self) -> None:
        """Name the keys that are set and that no method of the run has a use for, and a learning rate that is not set."""
        config = self.config
        if keys := config.unheeded():
            theirs = rates(config.methods) if {*keys} & {*rates(METHODS)} else []
            wanted = [name for name in theirs if name not in config.changed(*theirs)]
            other = f"; set {' or '.join(wanted)}" if wanted else ""
            self.say(f"{', '.join(keys)}: of no effect with {' and '.join(config.methods)}{other}")

    def seed(self, *names: object) -> int:
        """The seed of one use of randomness, by names that no other use has."""
        return derived_seed(self.config.seed, *names)

    def callback(self, stage: str, iteration: int | None) -> MetricsCallback:
        """Writes what a stage's trainer logs to metrics.jsonl, and counts its steps."""
        made = MetricsCallback(self.store.log, stage, iteration)
        self._bars.callback(made.close)
        return made

    def snapshots(self, kind: str, iteration: int, save: Callable[[Path], object]) -> list[SnapshotCallback]:
        """The callback that keeps weights inside an iteration, if the run does.

        What a stopped attempt left goes, unless the attempt is continued from its checkpoint.
        """
        if not self.processes.first:
            return []
        folder = self.store.snapshots(kind, iteration)
        if newest(self.store.trainer("refine" if kind == "reward" else kind, iteration))[1] is None:
            shutil.rmtree(folder, ignore_errors=True)
        every = self.config.snapshot_every
        return [SnapshotCallback(save, folder, every)] if every else []

    @contextmanager
    def stage(self, name: str, iteration: int | None) -> Iterator[None]:
        """Time one stage; what an interrupted attempt at it had logged after its checkpoint is dropped first."""
        self.store.discard(name, iteration, after=newest(self.store.trainer(name, iteration))[0])
        with self._bars, self.store.usage.stage(name, iteration) as spent:
            yield
        self.stage_ended(name, iteration, spent())

    def stage_passed(self, name: str, iteration: int | None) -> None:
        """Say the end of a stage that is done, where its process was killed between its output and that line."""
        if seconds := self.store.usage.unfinished(name, iteration):
            said = [(line["stage"], line["iteration"], line.get("event")) for line in self.store.metrics()]
            if (name, iteration, "end") not in said:
                self.stage_ended(name, iteration, seconds)

    def stage_ended(self, name: str, iteration: int | None, seconds: float) -> None:
        """Say so in metrics.jsonl: seconds of all processes that worked on it, and the run's peak memory so far."""
        usage = self.store.usage
        line = {"stage": name, "iteration": iteration, "step": None, "event": "end"}
        self.store.log({**line, "seconds": round(seconds, 3), "peak_rss_mb": usage.peak_rss_mb()})
        usage.note()


def open_run(
    config: RunConfig, resume: bool, processes: Processes, began: float | None = None, writes: bool = True
) -> Run:
    """Open a run whose directory fits; a new one is not on the disk yet. `began` and `writes` as in `open_all`.

    Raises:
        InputError: the directory is of another configuration, or in use; or nothing can report to `report_to`.
    """
    check_reports(config.report_to)
    store = RunDirectory(config, resume, processes.first and writes, began)
    return Run(config, store, processes)
