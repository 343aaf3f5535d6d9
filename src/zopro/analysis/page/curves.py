"""The curves of a run, as plain data."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any

from zopro.analysis.page.charts import POLICY, REWARD, Chart, Series, boundaries, running_mean
from zopro.analysis.reading.records import Record, is_number, latest_evaluations, stage_seconds
from zopro.store import shown


def run_charts(metrics: list[Record], start: shown.Start) -> list[Chart]:
    """All curves of a run; those without a point, or that stay at zero, draw nothing."""
    return [
        *evaluation_charts(latest_evaluations(metrics), start),
        *training_charts(metrics, start),
        memory_chart(metrics),
    ]


def evaluation_charts(evaluations: list[Record], start: shown.Start) -> list[Chart]:
    """What held-out prompts say before the first iteration and after every one."""
    names = [start.name if line.get("iteration") is None else str(line["iteration"]) for line in evaluations]

    def chart(title: str, key: str, **options: Any) -> Chart:
        rows = [(float(i), line) for i, line in enumerate(evaluations) if is_number(line.get(key))]
        banded = all(is_number(line.get(f"{key}_{edge}")) for _, line in rows for edge in ("low", "high"))
        band = [(line[f"{key}_low"], line[f"{key}_high"]) for _, line in rows] if banded else []
        points = [(x, line[key]) for x, line in rows]
        return Chart(title, [Series(title, points, band, dots=True)], "policy", x_names=names, **options)

    metric = next((str(line["metric_name"]) for line in evaluations if line.get("metric_name")), "metric")
    return [
        chart("Held-out reward, 95 % interval", "reward"),
        chart("Accuracy on held-out prompts, 95 % interval", "accuracy"),
        chart("Share of prompts with a right answer among several", "pass_at_k"),
        chart("Reward of the likeliest answers, 95 % interval", "greedy_reward"),
        chart(f"Win rate against {start.the}, 95 % interval", "win_rate", rule=(0.5, "even")),
        chart(f"KL to {start.the}, nats per answer", shown.PER_ANSWER),
        chart(f"Against the references: {metric}", "metric"),
    ]


def training_charts(metrics: Iterable[Record], start: shown.Start) -> list[Chart]:
    """What the training steps say; the policy's iterations are laid end to end."""
    steps = {(m["stage"], m.get("iteration"), m["step"]): m for m in metrics if is_number(m.get("step")) and "stage" in m}
    lines = sorted(steps.values(), key=lambda m: (m.get("iteration") or 0, m["step"]))
    policy = [line for line in lines if line["stage"] == "policy"]
    iterations = sorted({line.get("iteration") or 0 for line in policy})
    lengths = [max(line["step"] for line in policy if (line.get("iteration") or 0) == i) for i in iterations]
    starts = dict(zip(iterations, boundaries(lengths), strict=True))
    dividers = [(start + 0.5, str(i)) for i, start in starts.items()] if len(starts) > 1 else []

    def policy_chart(title: str, key: str, **options: Any) -> Chart:
        of_each: dict[int, list[tuple[float, float]]] = {i: [] for i in iterations}
        for line in policy:
            if is_number(line.get(key)):
                i = line.get("iteration") or 0
                of_each[i].append((starts[i] + line["step"], line[key]))
        points = [*chain(*of_each.values())]
        window = max(1, len(points) // 12)
        series = [Series("each step", points, style=f"{POLICY} faint" if window > 1 else POLICY)]
        if window > 1:  # begun anew in each iteration, whose rewards may be by another reward model
            means = chain(*(running_mean(one, window) for one in of_each.values()))
            series.append(Series(f"mean of {window} steps", [*means]))
        x_label = "step (numbers above: iteration)" if dividers else "step"
        return Chart(title, series, x_label, dividers=dividers, **options)

    def loss_chart(stage: str, title: str, style: str) -> Chart:
        points = [(m["step"], m["loss"]) for m in lines if m["stage"] == stage and is_number(m.get("loss"))]
        return Chart(title, [Series("loss", points, style=style)], "step")

    both = [
        (line["loss"], line["reward"]) for line in policy if is_number(line.get("loss")) and is_number(line.get("reward"))
    ]
    mirrored = bool(both) and all(abs(loss + reward) <= 1e-6 for loss, reward in both)  # es: the reward upside down
    return [
        policy_chart("Reward while training", "reward"),
        *([] if mirrored else [policy_chart("Loss while training the policy", "loss")]),
        policy_chart(f"KL to {start.the} while training, nats per token", shown.PER_TOKEN),
        policy_chart("Signal to noise of members' rewards", "signal_to_noise", log=True)
        if mirrored
        else policy_chart("Signal to noise of the projected gradient", "signal_to_noise", log=True, rule=(3.0, "3")),
        loss_chart("sft", "Loss of supervised fine-tuning", POLICY),
        loss_chart("reward", "Loss of the first reward model", REWARD),
    ]


def memory_chart(metrics: Iterable[Record]) -> Chart:
    """Peak resident memory over the seconds of the stages, one after the other."""
    stages = [line for line in stage_seconds(metrics) if is_number(line.get("peak_rss_mb"))]
    ends = boundaries([*(line["seconds"] for line in stages), 0.0])[1:]
    points = [(x, line["peak_rss_mb"]) for x, line in zip(ends, stages, strict=True)]
    return Chart("Peak memory so far, MB", [Series("peak memory", points, dots=True)], "seconds")
