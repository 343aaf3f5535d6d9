"""What a finished run says of itself: RUN/summary.json, from the other files of its directory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median_low
from typing import Any

from zopro.config import RunConfig
from zopro.store import shown
from zopro.store.durable import read_json
from zopro.store.journal import read
from zopro.store.rundir import RunDirectory, read_rows

Measure = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, float | None]]
SAMPLES_SHOWN = 5
OTHER = "other"  # seconds beside the stages: loading, analysis and figures, and what a crashed process did not record


def headline(directory: RunDirectory, iteration: int, sft_steps: int) -> str:
    """An iteration's evaluation as one line, beside what the run of so many steps of SFT had before it."""
    start = shown.start(sft_steps)
    sft, line = (measured(directory, name) for name in (None, iteration))
    right = ""
    if line.get("accuracy") is not None:
        right = f"accuracy {shown.interval(line, 'accuracy')} ({start.name} {shown.share(sft.get('accuracy'))}), "
    reward = f"reward {shown.interval(line, 'reward')} ({start.name} {shown.reward(sft['reward'])})"
    return (
        f"iteration {iteration}: {reward}, {right}"
        f"KL {shown.kl(line[shown.PER_ANSWER])} nats per answer, wins {shown.share(line['win_rate'])} against {start.the}"
    )


def summary(
    directory: RunDirectory,
    config: RunConfig,
    processes: int,
    used: Sequence[Mapping[str, Any]],
    measure: Measure | None = None,
) -> dict[str, Any]:
    """The object of summary.json.

    Args:
        processes: that ended the run, one for each rank.
        used: what each attempt has used (`zopro.store.usage`). Their seconds add up, and their largest peak counts.
        measure: more numbers of each evaluation, from its rows.
    """
    names = [None, *range(config.iterations)]
    rows = [read_rows(directory.evaluation(name)) for name in names]
    evaluations = [measured(directory, name) for name in names]
    if measure is not None:
        evaluations = [{**line, **measure(answers)} for line, answers in zip(evaluations, rows, strict=True)]
    lines = directory.metrics()
    stages: dict[str, float] = {}
    for line in lines:
        if line.get("event") == "end":
            stages[line["stage"]] = round(stages.get(line["stage"], 0.0) + line["seconds"], 3)
    rest = sum(attempt["seconds"] for attempt in used) - sum(stages.values())
    stages[OTHER] = round(max(0.0, rest), 3)
    quality = reward_quality(lines)
    final = evaluations[-1]
    return {
        "run": str(directory.path),
        "report": str(directory.layout.report()),
        "method": config.method,
        "sft_steps": config.sft_steps,
        "seconds": round(sum(stages.values()), 3),
        "peak_rss_mb": max(attempt["peak_rss_mb"] for attempt in used),
        "reward_sft": evaluations[0]["reward"],
        "reward_final": final["reward"],
        "kl_per_answer_final": final[shown.PER_ANSWER],
        "win_rate": final["win_rate"],
        "win_rate_low": final["win_rate_low"],
        "win_rate_high": final["win_rate_high"],
        "iterations": config.iterations,
        "processes": processes,
        "exchanged_bytes_per_step": exchanged_bytes(directory, config.iterations),
        "stages": stages,
        "attempts": [{key: value for key, value in attempt.items() if key != "unfinished"} for attempt in used],
        "reward_accuracy": quality.get("accuracy"),
        "reward_quality": quality,
        "evaluations": evaluations,
        "samples": [
            {"prompt": b["prompt"], "sft": b["completion"], "aligned": a["completion"]}
            for b, a in list(zip(rows[0], rows[-1], strict=True))[:SAMPLES_SHOWN]
        ],
    }


def reward_quality(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What the first reward model is worth on held-out rows, by the lines of metrics.jsonl; empty where there is none."""
    found = next((line for line in lines if line["stage"] == "reward" and line.get("event") == "quality"), {})
    return {key: found[key] for key in ("accuracy", "pearson", "spearman", "n") if key in found}


def exchanged_bytes(directory: RunDirectory, iterations: int) -> int:
    """What one rank handed to the others in the median zeroth-order step, by the journals; 0 for a single process."""
    paths = map(directory.journal, range(iterations))
    sizes = [step.exchanged_bytes for path in paths if path.exists() for step in read(path).steps]
    return median_low(sizes) if sizes else 0


def measured(directory: RunDirectory, iteration: int | None) -> dict[str, Any]:
    """What an evaluation found."""
    return shown.named(read_json(directory.evaluation(iteration, ".json")))
