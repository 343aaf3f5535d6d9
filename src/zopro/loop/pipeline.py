"""The whole loop of one run: SFT -> reward model -> per iteration policy, sampled pairs, judge, refined reward model.

Every stage is skipped when its finished output is in the run directory, and a training stage continues from its newest
checkpoint, so a stopped run continues where it was, to the same bits (docs/reliability.md). This module alone joins the
stages; the method of the policy stage is a row of `zopro.train.methods`.

    zopro run examples/chat_gemma.yaml --iterations 2
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from zopro.analysis import write
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.evaluation import evaluate
from zopro.loop.policy_stage import shared, train_policy
from zopro.loop.session import Session
from zopro.loop.stages import refine_reward, sample_pairs, train_reward, train_sft
from zopro.loop.summary import Measure, headline, summary
from zopro.store.durable import read_json, stopped_by_full_disk
from zopro.store.rundir import RunDirectory, default_folder, write_text
from zopro.system.launch import Job, alone
from zopro.system.threads import torch_threads
from zopro.train.checkpoints import clear
from zopro.train.methods import ZEROTH_ORDER

SUMMARY = "summary.json"


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    quiet: bool = False,
    began: float | None = None,
    before: Mapping[str, float] | None = None,
    measure: Measure | None = None,
) -> dict[str, Any]:
    """Run the loop and return its summary (also RUN/summary.json), empty on all ranks but the first.

    A run that is finished is left as it is, and its summary returned.

    Args:
        config: all settings.
        resume: continue the run in `config.output_dir` where it stopped.
        quiet: no progress on stderr.
        began: when the caller began, by `time.perf_counter()`, if the run's seconds are to count from there.
        before: what the caller has done since then, in seconds by name: as stages of the run.
        measure: more numbers of each evaluation in the summary, from its rows (prompt, completion, reward, ...).

    Raises:
        InputError: something in the configuration, the data or the run directory does not fit, or another process is
            at work on it; nothing was written.
        Stopped: the disk is full, or another rank has died. The run can be resumed.
    """
    began = time.perf_counter() if began is None else began
    job = Job.join(config.device, config.rank_timeout)
    if config.parallel == "data" and config.method in ZEROTH_ORDER and config.prompts_per_step % job.size:
        raise InputError(
            f"prompts_per_step: must be a multiple of the number of processes, {job.size}, got "
            f"{config.prompts_per_step}. Change either, or set parallel: queries."
        )
    path = Path(job.settle(config.output_dir or default_folder(config)))
    remedy = f"Then continue with: zopro run {path / 'config.yaml'} --resume"
    with job.lost_ranks(f"Continue, with as many processes as you like: zopro run {path / 'config.yaml'} --resume"):
        session = Session(dataclasses.replace(config, output_dir=str(path)), resume, quiet, job, began)
        try:
            threads = read_json(path / "environment.json").get("threads", 0)  # as it began with
            with stopped_by_full_disk(path, remedy), torch_threads(threads):
                found = _loop(session, before or {}, measure)
        finally:
            with suppress(OSError):  # of a full disk, which is reported already
                session.directory.usage.close()
            session.directory.lock.release()
        job.leave()
    return found


def _loop(session: Session, before: Mapping[str, float], measure: Measure | None) -> dict[str, Any]:
    config, directory, job = session.config, session.directory, session.job
    if job.settle(_finished(directory, config)):
        session.say("the run is finished: nothing is left to do")
        return _kept(directory) if job.first else {}
    if job.first:
        directory.usage.begin()
    for name, seconds in before.items():
        session.stage_ended(name, None, seconds)
    for name, iteration, output, work in _stages(directory, config.iterations):
        if job.settle(not output.exists()):
            with session.stage(name, iteration), taking_part(session, name, iteration) as here:
                if here:
                    work(session, *(() if iteration is None else (iteration,)))
            job.wait()
        if not job.first:
            continue
        directory.verdicts(name, iteration).unlink(missing_ok=True)
        clear(directory.trainer(name, iteration))
        if name == "evaluation" and iteration is not None:
            session.say(headline(directory, iteration))
            if iteration + 1 < config.iterations:
                write.refresh(directory.path)
    if not job.first:
        return {}
    write.finish(directory.path)
    found = summary(directory, config, job.size, directory.usage.close(), measure)
    write.page(directory.path, found)
    write_text(directory.path / SUMMARY, json.dumps(found, indent=2, ensure_ascii=False))  # last: now all is there
    return found


def _stages(directory: RunDirectory, iterations: int) -> Iterator[tuple[str, int | None, Path, Callable[..., object]]]:
    """Name, iteration, output and work of each stage; the output says that it is done."""
    yield "sft", None, directory.sft(), train_sft
    yield "reward", None, directory.reward(0), train_reward
    yield "evaluation", None, directory.evaluation(None, ".json"), evaluate
    for i in range(iterations):
        yield "policy", i, directory.policy(i), train_policy
        yield "pairs", i, directory.iteration(i) / "preferences.jsonl", sample_pairs
        yield "refine", i, directory.reward(i + 1), refine_reward
        yield "evaluation", i, directory.evaluation(i, ".json"), evaluate


def _finished(directory: RunDirectory, config: RunConfig) -> bool:
    outputs = (output for _, _, output, _ in _stages(directory, config.iterations))
    return all(path.exists() for path in (directory.path / SUMMARY, *outputs))


def _kept(directory: RunDirectory) -> dict[str, Any]:
    """The summary of a finished run, whose folder may have moved since."""
    path = directory.path
    found = read_json(path / SUMMARY)
    return {**found, "run": str(path), "report": str(path / "report.html")}


@contextmanager
def taking_part(session: Session, name: str, iteration: int | None) -> Iterator[bool]:
    """Whether this process works on a stage: all ranks do on a zeroth-order policy, else the first one does, alone."""
    job = session.job
    if name == "policy" and iteration is not None and job.size > 1 and shared(session, iteration):
        with alone() if session.config.parallel == "queries" else nullcontext():
            yield True
        return
    with alone():
        yield job.first
