"""The whole loop of one run: SFT -> reward model -> per iteration policy, sampled pairs, judge, refined reward model.

Every stage is skipped when its finished output is in the run directory, and a training stage continues from its newest
checkpoint, so a stopped run continues where it was, to the same bits (docs/reliability.md). The stages are the rows of
`zopro.loop.table`; the method of the policy stage is a row of `zopro.train.methods`.

    zopro run examples/chat_gemma.yaml --iterations 2
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from zopro.analysis import write
from zopro.analysis.live import watching
from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.engine.opening import end
from zopro.errors import InputError
from zopro.loop.data import Data
from zopro.loop.estimate import estimate
from zopro.loop.improvement import follower, not_improved
from zopro.loop.models import Models
from zopro.loop.opening import open_all
from zopro.loop.run import Run
from zopro.loop.summary import Measure, headline, measured, summary
from zopro.loop.table import EVALUATION, Stage, walk
from zopro.store.durable import plain, read_json, stopped_by_full_disk
from zopro.store.layout import Layout
from zopro.store.rundir import FREE, RunDirectory, default_folder, followed, read_rows, write_text
from zopro.store.shown import PER_ANSWER
from zopro.system import progress
from zopro.system.launch import Processes, alone
from zopro.system.threads import torch_threads
from zopro.train.checkpoints import clear


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    began: float | None = None,
    before: Mapping[str, float] | None = None,
    live: bool = False,
) -> dict[str, Any]:
    """Run the loop and return its summary (also RUN/summary.json), empty on all ranks but the first.

    A run that is finished is left as it is, and its summary returned.

    Args:
        config: all settings.
        resume: continue the run in `config.output_dir` where it stopped.
        quiet: no progress on stderr.
        began: when the caller began, by `time.perf_counter()`, if the run's seconds are to count from there.
        before: what the caller has done since then, in seconds by name: as stages of the run.
        live: keep RUN/report.html up to date every few seconds, as a page that reloads itself, by a process beside.

    Raises:
        InputError: something in the configuration, the data or the run directory does not fit, or another process is
            at work on it; nothing was written.
        Stopped: the disk is full, or another rank has crashed. The run can be resumed.
    """
    with progress.reporting(quiet):
        return _run(config, resume, time.perf_counter() if began is None else began, before or {}, live)


def _run(config: RunConfig, resume: bool, began: float, before: Mapping[str, float], live: bool) -> dict[str, Any]:
    processes = Processes.join(config.device, config.rank_timeout)
    of_its_own = {*FREE, *(["engine"] if config.of_servers else [])} - {"parallel"}
    told = {key: value for key, value in config.to_dict().items() if key not in of_its_own}
    processes.agree({**told, "--resume": resume})
    if config.parallel == "data" and METHODS[config.method].zeroth_order and config.prompts_per_step % processes.size:
        raise InputError(
            f"prompts_per_step: must be a multiple of the number of processes, {processes.size}, got "
            f"{config.prompts_per_step}. Change either, or set parallel: queries."
        )
    path = Path(processes.settle(config.output_dir or default_folder(config)))
    config = dataclasses.replace(config, output_dir=str(path))
    config = followed(config, path) if resume else config
    resuming = f"zopro run {shlex.quote(str(Layout(path).config()))} --resume"
    with processes.lost_ranks(f"Continue, with as many processes as you like: {resuming}"):
        run, models, data = open_all(config, resume=resume, processes=processes, began=began)
        if not run.store.resumed:
            run.say(f"the run is in {path}; if it is stopped, continue it with: {resuming}")
        try:
            with stopped_by_full_disk(path, f"Then continue with: {resuming}"), torch_threads(run.store.threads()):
                found = _loop(run, models, data, before, live)
        finally:
            with suppress(OSError):  # of a full disk, which is reported already
                run.store.usage.close()
            run.store.lock.release()
            end(models.base)
        processes.leave()
    return found


def _loop(run: Run, models: Models, data: Data, before: Mapping[str, float], live: bool) -> dict[str, Any]:
    config, store, processes = run.config, run.store, run.processes
    if processes.settle(_finished(store, config)):
        run.say(f"the run is finished: nothing is left to do; more iterations: --iterations {config.iterations + 1}")
        return _kept(store) if processes.first else {}
    if processes.first:
        store.usage.begin()
    for name, seconds in before.items():
        run.stage_ended(name, None, seconds)
    live = live and processes.first
    if live:
        run.say(f"the report reloads itself: {store.layout.report().absolute().as_uri()}")
    with watching(store.path) if live else nullcontext():
        _stages(run, models, data, live)
        if processes.first:
            with progress.task("writing figures"):
                write.finish(store.path)
    if not processes.first:
        return {}
    with progress.task("writing the report"):
        found = summary(store, config, processes.size, store.usage.close(), _measure(models))
        write.page(store.path, found)
    write_text(store.layout.summary(), json.dumps(plain(found), indent=2, ensure_ascii=False))  # last: now all is there
    return found


def _stages(run: Run, models: Models, data: Data, live: bool) -> None:
    """Every stage that is not done, in its order; `live`: the report is drawn by another process meanwhile."""
    config, store, processes = run.config, run.store, run.processes
    expected = estimate(run, models, data) if progress.heard() and processes.size == 1 else None
    if expected is not None:
        run.say(expected.line())
    run.say_unheeded()
    stages = [*walk(config, config.iterations)]
    for number, (stage, iteration) in enumerate(stages, 1):
        if processes.settle(not stage.done(store, iteration)):
            progress.expect(None if expected is None else expected.around(stage, iteration))
            title = f"[{number}/{len(stages)}] {stage.title(iteration)}"
            with progress.task(title), run.stage(stage.name, iteration), _taking_part(run, stage, iteration) as here:
                if here:
                    stage.work(run, models, data, iteration)
            processes.wait()
        elif processes.first:
            run.stage_passed(stage.name, iteration)
        if not processes.first:
            continue
        store.verdicts(stage.name, iteration).unlink(missing_ok=True)
        clear(store.trainer(stage.name, iteration))
        if stage.name == EVALUATION and iteration is None and (measure := _measure(models)) is not None:
            measure(read_rows(store.evaluation(None)))  # one that fails does so now, and not after hours
        if stage.name == EVALUATION and iteration is not None:
            _say_result(run, iteration)
            if iteration + 1 < config.iterations and not live:
                with progress.task("writing the report so far"):
                    write.refresh(store.path)


def _measure(models: Models) -> Measure | None:
    """More numbers of each evaluation, which a judge of the user's may have."""
    found: Measure | None = getattr(models.judge, "in_summary", None)
    return found


def _say_result(run: Run, iteration: int) -> None:
    run.say(headline(run.store, iteration, run.config.sft_steps))
    before, after = (read_rows(run.store.evaluation(at)) for at in (iteration - 1 if iteration else None, iteration))
    rate = METHODS[run.config.method_of(iteration)].rate
    kl = measured(run.store, iteration)[PER_ANSWER]
    if note := not_improved(before, after, f"iteration {iteration}", rate, kl, follower(run.config, iteration)):
        run.say(note)


def _finished(store: RunDirectory, config: RunConfig) -> bool:
    stages = (stage.done(store, iteration) for stage, iteration in walk(config, config.iterations))
    return store.layout.summary().exists() and all(stages)


def _kept(store: RunDirectory) -> dict[str, Any]:
    """The summary of a finished run, whose folder may have moved since."""
    try:
        found = read_json(store.layout.summary())
    except InputError as error:
        raise InputError(f"{error} Or delete it: --resume then writes it anew.") from None
    return {**found, "run": str(store.path), "report": str(store.layout.report())}


@contextmanager
def _taking_part(run: Run, stage: Stage, iteration: int | None) -> Iterator[bool]:
    """Whether this process works on a stage: all do on one that is shared, else the first one does, alone."""
    if stage.for_all(run, iteration):
        with alone() if run.config.parallel == "queries" else nullcontext():
            yield True
        return
    with alone():
        yield run.processes.first
