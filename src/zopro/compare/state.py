"""What a training leaves of a policy beside its reward, for the start and for each method at its last point.

That is: which easy questions it still answers, how far it moved on prompts of another task, what its answers look like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from zopro.loop.bound import beyond
from zopro.loop.correctness import named
from zopro.loop.divergence import elsewhere
from zopro.loop.remembered import counts
from zopro.store import shown
from zopro.store.shown import ELSEWHERE, REMEMBERED
from zopro.system.statistics import Interval, crossed_interval, win_interval

NOTES = {
    "Easy questions kept": "Easy questions kept: of those that {origin} answers; the interval is over questions.",
    "KL, other prompts": "KL on other prompts: to {start}, in nats an answer, on prompts of another task.",
    "Degenerate": (
        "Degenerate: empty, without words, the same words or refusal over and over, what was asked, or another language "
        "than the reference's (the rule is zopro.text.degenerate)."
    ),
}


def state(measured: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> dict[str, Any]:
    """One policy's state from its trainings' measurements at their last points.

    Args:
        measured: of each training `known` [question], `other` (log-ratios [prompt], nats), and, as means of a prompt's
            answers, `degenerate` and `ended` [prompt], `length` [prompt], and `quality` (by reward or metric [prompt],
            None where it does not apply); what one lacks, as earlier versions did not measure it, is left out.
        start: the same of what all began with.
    """
    before = start.get("known", [])
    found: dict[str, Any] = {}
    if before and (known := _all(measured, "known")):
        found[REMEMBERED] = counts(known, before)
    if others := _all(measured, "other"):
        found |= elsewhere(others)
    for name in ("degenerate", "ended"):
        if values := _all(measured, name):
            found |= named(name, _share(values))
    if lengths := _all(measured, "length"):
        found["length"] = fmean(map(fmean, lengths))
    tables = _all(measured, "quality")
    if names := [name for name in start.get("quality", {}) if tables and all(name in table for table in tables)]:
        found["quality"] = {name: _quality([t[name] for t in tables], start["quality"][name]) for name in names}
    return found


def _share(values: Sequence[Sequence[float]]) -> Interval:
    """Mean and 95 % interval of shares [training][prompt]: Wilson's over prompts and, where the trainings themselves lie
    farther apart, that over prompts and trainings."""
    mean, low, high = win_interval([fmean(of_prompt) for of_prompt in zip(*values, strict=True)])
    if len(values) == 1:
        return mean, low, high
    _, lowest, highest = crossed_interval(values)
    return mean, max(0.0, min(low, lowest)), min(1.0, max(high, highest))


def _quality(values: Sequence[Sequence[float | None]], before: Sequence[float | None]) -> dict[str, Any]:
    """Mean and gain, paired by prompt, of [training][prompt], over the prompts that it applies to in all."""
    columns = [column for column in zip(before, *values, strict=True) if None not in column]
    if not columns:
        return {"mean": None, "n": 0}
    first, *rest = zip(*columns, strict=True)
    gains = [[after - at_first for after, at_first in zip(of_one, first, strict=True)] for of_one in rest]
    found = {"mean": fmean(map(fmean, rest)), "n": len(columns)}
    return {**found, **named("gain", crossed_interval(gains))}


def _all(measured: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    values = [line.get(name) for line in measured]
    return [] if any(not value for value in values) else values


def origin(result: Mapping[str, Any]) -> shown.Start:
    """What all trainings start from, named: iteration 0's policy where the plan says so, whatever KL is taken to."""
    start = shown.start(result.get("sft_steps"))
    if result.get("plan", {}).get("start") != "iteration":
        return start
    name = shown.policy(0, start)
    return shown.Start(name, name)


def state_table(result: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """A row for what all start from and each method: (name of the column, text); without columns that say nothing.

    There is no row of a comparison by an earlier version, which measured none of it.
    """
    before, first = result.get("before", {}), origin(result).name
    states = {first: before} | {name: method.get("final", {}) for name, method in result["methods"].items()}
    qualities = list(dict.fromkeys(name for found in states.values() for name in found.get("quality", {})))
    rows = [[("Policy", name), *_cells(found, qualities, name != first)] for name, found in states.items()]
    full = [any(cells[1] for cells in column) for column in zip(*rows, strict=True)]
    kept = [[cell for cell, said in zip(row, full, strict=True) if said] for row in rows]
    return kept if sum(full) > 1 else []


def _cells(found: Mapping[str, Any], qualities: Sequence[str], trained: bool) -> list[tuple[str, str]]:
    asked, ended, length = found.get(REMEMBERED), found.get("ended"), found.get("length")
    known = asked["known_before"] if asked else 0  # of none there is nothing to keep
    return [
        ("Easy questions known", f"{shown.count(asked['known'])} of {asked['of']}" if asked else ""),
        ("Easy questions kept", f"{shown.interval(asked, 'kept')} of {known}" if asked and known else ""),
        ("KL, other prompts", shown.kl_interval(found, ELSEWHERE) if ELSEWHERE in found else ""),
        ("Degenerate", shown.interval(found, "degenerate") if "degenerate" in found else ""),
        ("Ended", "" if ended is None else shown.share(ended)),
        ("Tokens", "" if length is None else shown.fixed(length, 1)),
        *((name, _valued(found.get("quality", {}).get(name), trained)) for name in qualities),
    ]


def _valued(found: Mapping[str, Any] | None, trained: bool) -> str:
    if found is None or found["mean"] is None:
        return ""
    gained = f", gain {shown.interval(found, 'gain')}" if trained else ""
    return f"{shown.fixed(found['mean'], 3)}{gained}"


def findings(result: Mapping[str, Any]) -> Iterator[str]:
    """Where a method's answers got worse by one measure while their reward rose, and where `max_kl` ended trainings or
    left them, as no step of theirs measures KL, beyond it."""
    for method, found in result["methods"].items():
        end = found["curve"][-1]
        if found.get("bounded"):
            steps = shown.fixed(end["step"], 1)
            yield f"{method}: max_kl ended {found['bounded']} of {found['seeds']} trainings; their mean is {steps} steps."
        elif line := beyond(end, result.get("max_kl", 0.0), method, shown.start(result.get("sft_steps")).the):
            yield f"{line}."
        rises = found.get("gain", {}).get("low") or 0
        for name, value in found.get("final", {}).get("quality", {}).items():
            if rises > 0 and (value.get("gain_high") or 0) < 0:
                yield f"{method}: the reward rises and {name} falls."


def notes(result: Mapping[str, Any]) -> list[str]:
    """What the table's columns are, a line each."""
    columns = {name for row in state_table(result) for name, _ in row}
    names = {"start": shown.start(result.get("sft_steps")).the, "origin": origin(result).the}
    return [*(note.format(**names) for name, note in NOTES.items() if name in columns), *findings(result)]
