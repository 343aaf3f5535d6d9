"""The whole loop of one run: SFT -> reward model -> per iteration policy, sampled pairs, judge, refined reward model.

Every stage is skipped when its finished output is in the run directory, and a training stage continues from its newest
checkpoint, so a stopped run continues where it was, to the same bits (docs/reliability.md). This module alone joins the
stages; the method of the policy stage is a row of `zopro.methods`.

    zopro run examples/chat_gemma.yaml --iterations 2
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zopro.analysis import write
from zopro.checkpoints import clear
from zopro.config import RunConfig
from zopro.durable import stopped_by_full_disk
from zopro.evaluation import evaluate
from zopro.memory import peak_rss_mb
from zopro.policy_stage import train_policy
from zopro.rundir import RunDirectory, read_rows, write_text
from zopro.session import Session
from zopro.stages import refine_reward, sample_pairs, train_reward, train_sft
from zopro.threads import torch_threads

SAMPLES_SHOWN = 5


def run(config: RunConfig, *, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run the loop and return its summary (also RUN/summary.json).

    Args:
        config: all settings.
        resume: continue the run in `config.output_dir` where it stopped.
        quiet: no progress on stderr.

    Raises:
        InputError: something in the configuration, the data or the run directory does not fit, or another process is
            at work on it; nothing was written.
        Stopped: the disk is full. The run can be resumed.
    """
    session = Session(config, resume, quiet)
    path = session.directory.path
    threads = json.loads((path / "environment.json").read_text(encoding="utf-8"))["threads"]  # as the run began with
    try:
        with (
            stopped_by_full_disk(path, f"Then continue with: zopro run {path / 'config.yaml'} --resume"),
            torch_threads(threads),
        ):
            return _loop(session)
    finally:
        session.directory.lock.release()


def _loop(session: Session) -> dict[str, Any]:
    config, directory = session.config, session.directory

    def stage(name: str, iteration: int | None, output: Path, work: Callable[..., object]) -> None:
        if not output.exists():
            with session.stage(name, iteration):
                work(session, *(() if iteration is None else (iteration,)))
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
        session.say(_headline(directory, iteration))
        if iteration + 1 < config.iterations:
            write.refresh(directory.path)
    summary = _summary(session)
    write_text(directory.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False))
    write.finish(directory.path)
    return summary


def _outputs(directory: RunDirectory, iteration: int) -> dict[str, Path]:
    """Which file or folder says that a stage of an iteration is done."""
    return {
        "policy": directory.policy(iteration),
        "pairs": directory.iteration(iteration) / "preferences.jsonl",
        "refine": directory.reward(iteration + 1),
    }


def _headline(directory: RunDirectory, iteration: int) -> str:
    sft, line = (json.loads(directory.evaluation(name, ".json").read_text()) for name in (None, iteration))
    interval = f"[{line['reward_low']:.3f}, {line['reward_high']:.3f}]"
    return (
        f"iteration {iteration}: reward {line['reward']:.3f} {interval} (SFT {sft['reward']:.3f}), "
        f"KL {line['kl']:.2f}, wins {line['win_rate']:.2f} against SFT"
    )


def _summary(session: Session) -> dict[str, Any]:
    directory, config = session.directory, session.config
    names = [None, *range(config.iterations)]
    evaluations = [json.loads(directory.evaluation(name, ".json").read_text()) for name in names]
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
        "stages": seconds,
        "reward_accuracy": quality.get("accuracy"),
        "reward_quality": {k: v for k, v in quality.items() if k in ("accuracy", "pearson", "spearman", "n")},
        "evaluations": evaluations,
        "samples": [
            {"prompt": b["prompt"], "sft": b["completion"], "aligned": a["completion"]}
            for b, a in list(zip(before, after, strict=True))[:SAMPLES_SHOWN]
        ],
    }
