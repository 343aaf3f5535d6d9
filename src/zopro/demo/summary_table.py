"""A run's summary for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from zopro.store import shown
from zopro.system.terminal import Page, Table

COLUMN = 52  # characters of each answer, side by side


def table(summary: Mapping[str, Any]) -> Page:
    """Format a summary of `zopro.loop.pipeline.run` (or of the demo, which has `truth` in its evaluations).

    Held-out reward and win rate against SFT by iteration with 95 % intervals, seconds per stage, peak memory, the
    samples with both answers side by side, and the paths of run and report.
    """
    return Page(
        Table(list(_evaluations(summary["evaluations"]))),
        "",
        *_costs(summary),
        "",
        *(line for sample in summary["samples"] for line in (*_sample(sample), "")),
        f"run     {summary['run']}\nreport  {summary['report']}",
    )


def _evaluations(lines: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Rows of cells, the header first; truth and metric only where they were measured."""
    truth = any(line.get("truth") is not None for line in lines)
    metric = next((line["metric_name"] for line in lines if line.get("metric") is not None), None)
    yield [
        f"{lines[0]['n']} held-out prompts",
        "reward [95 %]",
        "wins against SFT [95 %]",
        "KL per answer",
        *(["truth"] if truth else []),
        *([metric] if metric else []),
    ]
    for line in map(shown.named, lines):
        yield [
            "SFT" if line["iteration"] is None else f"iteration {line['iteration']}",
            shown.interval(line, "reward"),
            shown.interval(line, "win_rate"),
            shown.kl(line.get(shown.PER_ANSWER)),
            *([shown.share(line.get("truth"))] if truth else []),
            *([shown.metric(line.get("metric"))] if metric else []),
        ]


def _costs(summary: Mapping[str, Any]) -> Iterator[str]:
    stages = ", ".join(f"{name} {shown.seconds(seconds)}" for name, seconds in summary["stages"].items())
    attempts = len(summary.get("attempts", ()))
    again = f" in {attempts} attempts" if attempts > 1 else ""
    yield f"seconds      {shown.seconds(summary['seconds'])}{again} ({stages})"
    yield f"peak memory  {shown.megabytes(summary['peak_rss_mb'])} MB resident"
    if summary.get("reward_quality"):
        yield f"reward model {shown.quality(summary['reward_quality'])} on held-out rows"


def _sample(sample: Mapping[str, str]) -> Iterator[str]:
    prompt = re.sub(r"<[^<>\s]+>", " ", sample["prompt"])  # the chat template's marks
    yield textwrap.shorten(prompt, 2 * COLUMN, placeholder=" ...")
    answers = [
        textwrap.wrap(f"{name}: {sample[key]}", COLUMN - 4) for name, key in (("SFT", "sft"), ("aligned", "aligned"))
    ]
    for left, right in zip_longest(*answers, fillvalue=""):
        yield f"  {left:<{COLUMN}}{right}".rstrip()
