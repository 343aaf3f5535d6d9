"""The whole loop of one run: SFT -> reward model -> per iteration policy, sampled pairs, judge, refined reward model.

Every stage is skipped when its finished output is in the run directory, and a training stage continues from its newest
checkpoint, so a stopped run continues where it was, to the same bits (docs/reliability.md). This module alone joins the
stages; the method of the policy stage is a row of `zopro.methods`.

    zopro run examples/chat_gemma.yaml --iterations 2
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median_low
from typing import Any

from zopro.analysis import write
from zopro.checkpoints import clear
from zopro.config import RunConfig
from zopro.durable import read_json, stopped_by_full_disk
from zopro.errors import InputError
from zopro.evaluation import evaluate
from zopro.journal import read
from zopro.launch import Job, alone
from zopro.memory import peak_rss_mb
from zopro.methods import ZEROTH_ORDER
from zopro.policy_stage import shared, train_policy
from zopro.rundir import RunDirectory, default_folder, read_rows, write_text
from zopro.session import Session
from zopro.stages import refine_reward, sample_pairs, train_reward, train_sft
from zopro.threads import torch_threads

SAMPLES_SHOWN = 5


def run(config: RunConfig, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run the loop and return its summary (also RUN/summary.json), empty on all ranks but the first.

    Args:
        config: all settings.
        resume: continue the run in `config.output_dir` where it stopped.
        quiet: no progress on stderr.

    Raises:
        InputError: something in the configuration, the data or the run directory does not fit, or another process is
            at work on it; nothing was written.
        Stopped: the disk is full, or another rank has died. The run can be resumed.
    """
    job = Job.join(config.device, config.rank_timeout)
    if config.parallel == "data" and config.method in ZEROTH_ORDER and config.prompts_per_step % job.size:
        raise InputError(
            f"prompts_per_step: must be a multiple of the number of processes, {job.size}, got "
            f"{config.prompts_per_step}. Change either, or set parallel: queries."
        )
    path = Path(job.settle(config.output_dir or default_folder(config)))
    remedy = f"Then continue with: zopro run {path / 'config.yaml'} --resume"
    with job.lost_ranks(f"Continue, with as many processes as you like: zopro run {path / 'config.yaml'} --resume"):
        session = Session(dataclasses.replace(config, output_dir=str(path)), resume, quiet, job)
        try:
            threads = read_json(path / "environment.json").get("threads", 0)  # as it began with
            with stopped_by_full_disk(path, remedy), torch_threads(threads):
                summary = _loop(session)
        finally:
            session.directory.lock.release()
        job.leave()
    return summary


def _loop(session: Session) -> dict[str, Any]:
    config, directory, job = session.config, session.directory, session.job

    def stage(name: str, iteration: int | None, output: Path, work: Callable[..., object]) -> None:
        if job.settle(not output.exists()):
            with session.stage(name, iteration), taking_part(session, name, iteration) as here:
                if here:
                    work(session, *(() if iteration is None else (iteration,)))
            job.wait()
        if job.first:
            directory.verdicts(name, iteration).unlink(missing_ok=True)
            clear(directory.trainer(name, iteration))

    stage("sft", None, directory.sft(), train_sft)
    stage("reward", None, directory.reward(0), train_reward)
    stage("evaluation", None, directory.evaluation(None, ".json"), evaluate)
    for iteration in range(config.iterations):
        outputs = _outputs(directory, iteration)
        stage("policy", iteration, outputs["policy"], train_policy)
        stage("pairs", iteration, outputs["pairs"], sample_pairs)
        stage("refine", iteration, outputs["refine"], refine_reward)
        stage("evaluation", iteration, directory.evaluation(iteration, ".json"), evaluate)
        if job.first:
            session.say(_headline(directory, iteration))
            if iteration + 1 < config.iterations:
                write.refresh(directory.path)
    if not job.first:
        return {}
    summary = _summary(session)
    write_text(directory.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    write.finish(directory.path)
    return summary


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


def _outputs(directory: RunDirectory, iteration: int) -> dict[str, Path]:
    """Which file or folder says that a stage of an iteration is done."""
    return {
        "policy": directory.policy(iteration),
        "pairs": directory.iteration(iteration) / "preferences.jsonl",
        "refine": directory.reward(iteration + 1),
    }


def exchanged_bytes(directory: RunDirectory, iterations: int) -> int:
    """What one rank handed to the others in the median zeroth-order step, by the journals; 0 for a single process."""
    paths = [directory.iteration(iteration) / "journal.jsonl" for iteration in range(iterations)]
    sizes = [step.exchanged_bytes for path in paths if path.exists() for step in read(path).steps]
    return median_low(sizes) if sizes else 0


def _headline(directory: RunDirectory, iteration: int) -> str:
    sft, line = (read_json(directory.evaluation(name, ".json")) for name in (None, iteration))
    interval = f"[{line['reward_low']:.3f}, {line['reward_high']:.3f}]"
    return (
        f"iteration {iteration}: reward {line['reward']:.3f} {interval} (SFT {sft['reward']:.3f}), "
        f"KL {line['kl']:.2f}, wins {line['win_rate']:.2f} against SFT"
    )


def _summary(session: Session) -> dict[str, Any]:
    directory, config = session.directory, session.config
    names = [None, *range(config.iterations)]
    evaluations = [read_json(directory.evaluation(name, ".json")) for name in names]
    lines = directory.metrics()
    seconds: dict[str, float] = {}
    for line in lines:
        if line.get("event") == "end":
            seconds[line["stage"]] = round(seconds.get(line["stage"], 0.0) + line["seconds"], 3)
    quality = next((x for x in lines if x["stage"] == "reward" and x.get("event") == "quality"), {})
    before, after = (read_rows(directory.evaluation(name)) for name in (None, config.iterations - 1))
    final = evaluations[-1]
    return {
        "run": str(directory.path),
        "report": str(directory.path / "report.html"),
        "method": config.method,
        "seconds": round(sum(seconds.values()), 3),
        "peak_rss_mb": round(peak_rss_mb(), 1),
        "reward_sft": evaluations[0]["reward"],
        "reward_final": final["reward"],
        "kl_final": final["kl"],
        "win_rate": final["win_rate"],
        "win_rate_low": final["win_rate_low"],
        "win_rate_high": final["win_rate_high"],
        "iterations": config.iterations,
        "processes": session.job.size,
        "exchanged_bytes_per_step": exchanged_bytes(directory, config.iterations),
        "stages": seconds,
        "reward_accuracy": quality.get("accuracy"),
        "reward_quality": {k: v for k, v in quality.items() if k in ("accuracy", "pearson", "spearman", "n")},
        "evaluations": evaluations,
        "samples": [
            {"prompt": b["prompt"], "sft": b["completion"], "aligned": a["completion"]}
            for b, a in list(zip(before, after, strict=True))[:SAMPLES_SHOWN]
        ],
    }
