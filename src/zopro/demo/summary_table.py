"""A run's summary for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import Any

from zopro.store import shown
from zopro.system.terminal import Page, Table
from zopro.text.degenerate import called
from zopro.text.turns import turns

COLUMN = 52  # characters of each answer, side by side


def table(summary: Mapping[str, Any]) -> Page:
    """Format a summary of `zopro.loop.pipeline.run` (or of the demo, which has `truth` in its evaluations).

    Held-out reward and win rate against the start by iteration with 95 % intervals, seconds per stage, peak memory, the
    samples with both answers side by side, and the paths of run and report.
    """
    start = shown.start(summary.get("sft_steps"))
    return Page(
        Table(list(_evaluations(summary["evaluations"], start))),
        "",
        *_gained(summary["evaluations"][-1]),
        *_forgotten(summary["evaluations"][-1]),
        *_costs(summary, start),
        "",
        *(line for sample in summary["samples"] for line in (*_sample(sample, start), "")),
        f"run     {summary['run']}\nreport  {summary['report']}",
    )


def _evaluations(lines: Sequence[Mapping[str, Any]], start: shown.Start) -> Iterator[list[str]]:
    """Rows of cells, the header first; truth and metric only where they were measured."""
    truth = any(line.get("truth") is not None for line in lines)
    metric = next((line["metric_name"] for line in lines if line.get("metric") is not None), None)
    checks, greedy, several = (
        any(line.get(name) is not None for line in lines) for name in ("accuracy", "greedy_reward", "pass_at_k")
    )
    yield [
        shown.several(lines[0].get("prompts", lines[0]["n"]), "held-out prompt"),
        "reward [95 %]",
        f"wins against {start.the} [95 %]",
        "KL per answer",
        *(["truth"] if truth else []),
        *([metric] if metric else []),
        *(["accuracy [95 %]"] if checks else []),
        *([f"pass@{lines[0]['samples']}"] if several else []),
        *(["greedy reward"] if greedy else []),
        *(["greedy accuracy"] if greedy and checks else []),
        *(["length", "ended"] if lines[0].get("ended") is not None else []),
    ]
    for line in map(shown.named, lines):
        yield [
            shown.policy(line["iteration"], start),
            shown.interval(line, "reward"),
            shown.interval(line, "win_rate"),
            shown.kl(line.get(shown.PER_ANSWER)),
            *([shown.share(line.get("truth"))] if truth else []),
            *([shown.metric(line.get("metric"))] if metric else []),
            *([shown.interval(line, "accuracy")] if checks else []),
            *([shown.share(line.get("pass_at_k"))] if several else []),
            *([shown.reward(line.get("greedy_reward"))] if greedy else []),
            *([shown.share(line.get("greedy_accuracy"))] if greedy and checks else []),
            *([shown.fixed(line["length"], 1), shown.share(line["ended"])] if line.get("ended") is not None else []),
        ]


def _gained(line: Mapping[str, Any]) -> Iterator[str]:
    """What the last policy has gained over what the run began with, paired by prompt."""
    names = ("reward", "accuracy", "greedy_reward", "greedy_accuracy")
    gains = [
        f"{name.replace('_', ' ')} {shown.interval(line, f'{name}_gain')}"
        for name in names
        if line.get(f"{name}_gain") is not None
    ]
    if gains:
        yield f"gained       {', '.join(gains)}"


def _forgotten(line: Mapping[str, Any]) -> Iterator[str]:
    """What the last policy can no longer answer, of what the base model could, and how far it moved on another task."""
    if line.get(shown.REMEMBERED) is not None:
        yield shown.remembered(line[shown.REMEMBERED]).replace("forgotten: ", "forgotten    ", 1)
    if elsewhere := shown.elsewhere(line):
        yield f"elsewhere    {elsewhere}"


def _costs(summary: Mapping[str, Any], start: shown.Start) -> Iterator[str]:
    stages = ", ".join(f"{shown.stage(name, start)} {shown.seconds(s)}" for name, s in summary["stages"].items())
    attempts = len(summary.get("attempts", ()))
    again = f" in {attempts} attempts" if attempts > 1 else ""
    yield f"seconds      {shown.seconds(summary['seconds'])}{again} ({stages})"
    yield f"peak memory  {shown.megabytes(summary['peak_rss_mb'])} MB resident"
    if summary.get("reward_quality"):
        yield f"reward model {shown.held_out(summary['reward_quality'])}"


def _sample(sample: Mapping[str, str], start: shown.Start) -> Iterator[str]:
    asked = turns(sample["prompt"])[-1][1]
    yield textwrap.shorten(asked, 2 * COLUMN, placeholder=" ...")
    names = (start.name, called(sample["aligned"], request=asked))
    answers = [
        textwrap.wrap(f"{name}: {sample[key]}", COLUMN - 4) for name, key in zip(names, ("sft", "aligned"), strict=True)
    ]
    for left, right in zip_longest(*answers, fillvalue=""):
        yield f"  {left:<{COLUMN}}{right}".rstrip()
