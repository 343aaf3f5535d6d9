"""A run directory as one self-contained page: headline, curves, samples, configuration, environment.

Reads files only, whatever of them is there yet: a run in progress gives a shorter page. Everything that came out of
a model or a data set is escaped by the template.

    python -c "from zopro.analysis.page.report import write_report; print(write_report('RUN'))"
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import jinja2
import yaml

from zopro.analysis.page.charts import Chart, Series, boundaries, running_mean
from zopro.analysis.page.interplay import drawn, page_parts
from zopro.config import GROUPS
from zopro.config.defaults import default_of
from zopro.errors import InputError
from zopro.store import shown
from zopro.store.layout import Layout, numbered

Record = dict[str, Any]
SAMPLE_PROMPTS = 20


def write_report(
    run: str | Path, target: Path | None = None, analysis: Record | None = None, summary: Record | None = None
) -> Path:
    """Write `run`/report.html (or `target`) from what the run directory holds and return its path.

    The page replaces the previous one in one step, so a reader never sees half of it. `analysis` is what
    `zopro.analysis.analyse` gives, by default that in `run`/analysis.json; `summary` likewise, of `run`/summary.json.
    Raises `InputError` if `run` is not a folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"RUN: must be a run directory, got '{run}' (no such folder).")
    target = target or Layout(run).report()
    partial = target.with_name(f"{target.name}.partial")
    # Data may hold lone surrogates, which UTF-8 cannot: they become question marks.
    partial.write_bytes(render(run, analysis, summary).encode("utf-8", "replace"))
    os.replace(partial, target)
    return target


def render(run: Path, analysis: Record | None = None, summary: Record | None = None) -> str:
    """Return the page of run directory `run`."""
    layout, metrics = Layout(run), read_metrics(run)
    summary = _read(layout.summary(), json.loads) if summary is None else summary
    config = _read(layout.config(), yaml.safe_load)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals["shown"] = shown
    found = analysis if analysis is not None else _read(layout.analysis(), json.loads)
    return environment.get_template("report.html.j2").render(
        run=run.resolve().name,
        config=config,
        groups=_config_groups(config),
        environment=_flat(_read(layout.environment(), json.loads)),
        summary=summary,
        evaluations=latest_evaluations(metrics),
        charts=drawn(run_charts(run)),
        stages=stage_seconds(metrics, summary),
        samples=samples(run),
        **page_parts(found),
    )


def run_charts(run: Path) -> list[Chart]:
    """All curves of a run directory; those without a point draw nothing."""
    metrics = read_metrics(run)
    return [*evaluation_charts(latest_evaluations(metrics)), *training_charts(metrics), memory_chart(metrics)]


def read_metrics(run: Path) -> list[Record]:
    """The lines of metrics.jsonl, those of earlier versions with the names of today."""
    return [shown.named(line) for line in read_jsonl(Layout(run).metrics())]


def read_jsonl(path: Path) -> list[Record]:
    """The objects of a .jsonl file; a missing file gives none, an unfinished last line is left out."""
    records = []
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def latest_evaluations(metrics: Iterable[Record]) -> list[Record]:
    """One evaluation per iteration, SFT (iteration None) first; after a resume the later line counts."""
    found = {line.get("iteration"): line for line in metrics if line.get("stage") == "evaluation" and "reward" in line}
    return [found[key] for key in sorted(found, key=lambda i: -1 if i is None else i)]


def evaluation_charts(evaluations: list[Record]) -> list[Chart]:
    """What held-out prompts say after SFT and after every iteration."""
    names = [iteration_name(line) for line in evaluations]

    def chart(title: str, key: str, **options: Any) -> Chart:
        rows = [(float(i), line) for i, line in enumerate(evaluations) if _is_number(line.get(key))]
        banded = all(_is_number(line.get(f"{key}_{edge}")) for _, line in rows for edge in ("low", "high"))
        band = [(line[f"{key}_low"], line[f"{key}_high"]) for _, line in rows] if banded else []
        points = [(x, line[key]) for x, line in rows]
        return Chart(title, [Series(title, points, band, dots=True)], "policy", x_names=names, **options)

    metric = next((str(line["metric_name"]) for line in evaluations if line.get("metric_name")), "metric")
    return [
        chart("Held-out reward, 95 % interval", "reward"),
        chart("Accuracy on held-out prompts, 95 % interval", "accuracy"),
        chart("Share of prompts with a right answer among several", "pass_at_k"),
        chart("Reward of the likeliest answers, 95 % interval", "greedy_reward"),
        chart("Win rate against SFT, 95 % interval", "win_rate", rule=(0.5, "even")),
        chart("KL to the SFT policy, nats per answer", shown.PER_ANSWER),
        chart(f"Against the references: {metric}", "metric"),
    ]


def training_charts(metrics: Iterable[Record]) -> list[Chart]:
    """What the training steps say; the policy's iterations are laid end to end."""
    steps = {
        (m["stage"], m.get("iteration"), m["step"]): m for m in metrics if _is_number(m.get("step")) and "stage" in m
    }
    lines = sorted(steps.values(), key=lambda m: (m.get("iteration") or 0, m["step"]))
    policy = [line for line in lines if line["stage"] == "policy"]
    iterations = sorted({line.get("iteration") or 0 for line in policy})
    lengths = [max(line["step"] for line in policy if (line.get("iteration") or 0) == i) for i in iterations]
    starts = dict(zip(iterations, boundaries(lengths), strict=True))
    dividers = [(start, str(i)) for i, start in starts.items()] if len(starts) > 1 else []

    def policy_chart(title: str, key: str, **options: Any) -> Chart:
        points = [(starts[m.get("iteration") or 0] + m["step"], m[key]) for m in policy if _is_number(m.get(key))]
        window = max(1, len(points) // 12)
        mean = Series(f"mean of {window} steps", running_mean(points, window))
        series = [Series("each step", points, style="faint"), mean]
        return Chart(title, series, "step (numbers above: iteration)", dividers=dividers, **options)

    def loss_chart(stage: str, title: str) -> Chart:
        points = [(m["step"], m["loss"]) for m in lines if m["stage"] == stage and _is_number(m.get("loss"))]
        return Chart(title, [Series("loss", points, style="c2")], "step")

    return [
        policy_chart("Reward while training", "reward"),
        policy_chart("Loss while training the policy", "loss"),
        policy_chart("KL to the SFT policy while training, nats per token", shown.PER_TOKEN),
        policy_chart("Signal to noise of the projected gradient", "signal_to_noise", log=True, rule=(3.0, "3")),
        loss_chart("sft", "Loss of supervised fine-tuning"),
        loss_chart("reward", "Loss of the first reward model"),
    ]


def stage_seconds(metrics: Iterable[Record], summary: Record | None = None) -> list[Record]:
    """Seconds and peak memory so far of every finished stage, in the order they ended, with `share` of the longest.

    With the `summary` of a finished run what it has beside the stages comes last, so that all add up to its seconds.
    """
    ends = {
        (line.get("stage"), line.get("iteration")): line
        for line in metrics
        if line.get("event") == "end" and _is_number(line.get("seconds"))
    }
    lines = list(ends.values())
    rest = ((summary or {}).get("stages") or {}).get("other")
    if summary and _is_number(rest):
        lines.append({"stage": "other", "seconds": rest, "peak_rss_mb": summary.get("peak_rss_mb")})
    longest = max((line["seconds"] for line in lines), default=0) or 1
    return [{**line, "share": line["seconds"] / longest} for line in lines]


def memory_chart(metrics: Iterable[Record]) -> Chart:
    """Peak resident memory over the seconds of the stages, one after the other."""
    stages = [line for line in stage_seconds(metrics) if _is_number(line.get("peak_rss_mb"))]
    ends = boundaries([*(line["seconds"] for line in stages), 0.0])[1:]
    points = [(x, line["peak_rss_mb"]) for x, line in zip(ends, stages, strict=True)]
    return Chart("Peak memory so far, MB", [Series("peak memory", points, dots=True)], "seconds")


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with every policy's answer to it; `answers` rows: name, completion, reward, win."""

    prompt: str
    reference: str | None
    answers: list[Record]


def samples(run: Path) -> list[Sample]:
    """The first held-out prompts with the answers of the base model, of SFT and of each iteration."""
    layout = Layout(run)
    files = {"base model": layout.evaluation("base"), "SFT": layout.evaluation(None)}
    for iteration, path in numbered(layout.evaluations(), ".jsonl").items():
        files[f"iteration {iteration}"] = path
    answers: dict[str, list[Record]] = {}
    references: dict[str, str | None] = {}
    for name, path in files.items():
        for row in read_jsonl(path):
            prompt = str(row.get("prompt", ""))
            if prompt not in answers:
                if len(answers) == SAMPLE_PROMPTS:
                    continue
                answers[prompt], references[prompt] = [], row.get("reference")
            if not any(answer["name"] == name for answer in answers[prompt]):
                answers[prompt].append({**row, "name": name})
    return [Sample(prompt, references[prompt], rows) for prompt, rows in answers.items()]


def iteration_name(line: Record) -> str:
    return "SFT" if line.get("iteration") is None else str(line["iteration"])


def _config_groups(config: Record) -> list[tuple[str, list[Record]]]:
    """The run's keys under the titles of `zopro.config`, each with its help and whether it is the default."""
    groups = []
    for group in GROUPS:
        rows = []
        for name, field in group.__dataclass_fields__.items():
            if name in config:
                default = default_of(field, str(config.get("task", "")))
                rows.append(
                    {
                        "name": name,
                        "value": config[name],
                        "help": field.metadata["help"],
                        "changed": config[name] != default,
                    }
                )
        groups.append(((group.__doc__ or "").rstrip("."), rows))
    return [(title, rows) for title, rows in groups if rows]


def _flat(tree: Record, prefix: str = "") -> Record:
    """Nested objects as one level of dotted names."""
    flat: Record = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _read(path: Path, parse: Any) -> Record:
    try:
        value = parse(path.read_text("utf-8", "replace"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
