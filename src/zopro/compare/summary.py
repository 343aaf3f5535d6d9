"""From measurements to curves with intervals, gains at equal seconds and at equal KL, and a Markdown table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations
from statistics import fmean, mean
from typing import Any

from zopro.compare.differences import difference_rows, differences, gap, signed, without_nan
from zopro.compare.reached import column, reached, yardstick
from zopro.compare.state import findings, notes, state, state_table
from zopro.loop.divergence import kl_per_answer
from zopro.store import shown
from zopro.store.shown import PER_ANSWER
from zopro.system.statistics import crossed_interval
from zopro.system.terminal import Page, Table

Curve = Sequence[Mapping[str, Any]]


def _point(step: float, seconds: float, measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    reward, low, high = without_nan(crossed_interval([line["rewards"] for line in measured]))
    kl = kl_per_answer([fmean(line[PER_ANSWER]) for line in measured])
    return {"step": step, "seconds": seconds, "reward": reward, "reward_low": low, "reward_high": high, PER_ANSWER: kl}


def start_point(start: Mapping[str, Any]) -> dict[str, Any]:
    """The policy every method starts from, as a point of a curve."""
    return _point(0, 0.0, [start])


def method_summary(results: Sequence[Mapping[str, Any]], start: Mapping[str, Any]) -> dict[str, Any]:
    """One method from its seeds' results.

    Curve, what it gained at the end (paired by prompt), peak memory (the largest of the seeds), seconds per step, and the
    rewards at the end, [seed][prompt], to set beside another method's; what else is left of the policy there (`final`);
    how many trainings `max_kl` ended (`bounded`); and the first seed's answers to a few prompts. The curve's last point
    is every seed's end, early or not.
    """
    count = min(len(result["points"]) for result in results)  # a budget may end a seed's training early
    curve = [start_point(start)]
    ends = [result["points"][-1] for result in results]
    passed = [[result["points"][index] for result in results] for index in range(count - 1)]  # the same marks of all
    for points in (*passed, ends):
        curve.append(_point(mean(p["step"] for p in points), fmean(p["seconds"] for p in points), points))
    final = [end["rewards"] for end in ends]
    return {
        "curve": curve,
        "gain": gap(final, [start["rewards"]] * len(final)),
        "peak_mb": max(result["peak_mb"] for result in results),
        "seconds_per_step": sum(r["seconds"] for r in results) / sum(r["steps"] for r in results),
        "final_rewards": final,
        "final": state(ends, start),
        "bounded": sum(bool(result.get("bounded")) for result in results),
        "texts": ends[0].get("texts", []),
    }


def beside(methods: Mapping[str, Mapping[str, Any]], against: str) -> dict[str, Any]:
    """Methods from one start, and what a comparison says of one beside another: keys of compare.json."""
    return {
        "methods": methods,
        "gain_ratios": gain_ratios(methods),
        "reached": reached(methods, against),
        "differences": differences(methods),
    }


def reward_at(curve: Curve, seconds: float) -> float:
    """Reward after so many seconds, linearly between points; the last one's after the end.

    >>> reward_at([{"seconds": 0.0, "reward": 0.0}, {"seconds": 2.0, "reward": 4.0}], 1.0)
    2.0
    """
    for before, after in pairwise(curve):
        if before["seconds"] <= seconds <= after["seconds"]:
            return _between(before, after, "seconds", seconds)
    return float(curve[-1]["reward"])


def reward_within(curve: Curve, kl: float) -> float:
    """The largest reward that the training had at no more than this KL, linearly between points.

    KL may fall again along a training, so that it has more than one reward at a KL: the best of them counts.

    >>> reward_within([{"kl_per_answer": kl, "reward": r} for kl, r in ((0, 0), (4, 2), (2, 3))], 3.0)
    3.0
    """
    found = [float(point["reward"]) for point in curve if point[PER_ANSWER] <= kl]
    for pair in pairwise(curve):
        low, high = sorted(pair, key=lambda point: float(point[PER_ANSWER]))
        if low[PER_ANSWER] <= kl < high[PER_ANSWER]:
            found.append(_between(low, high, PER_ANSWER, kl))
    return max(found, default=float(curve[0]["reward"]))


def _between(before: Mapping[str, Any], after: Mapping[str, Any], key: str, value: float) -> float:
    width = after[key] - before[key]
    share = (value - before[key]) / width if width > 0 else 1.0
    return float(before["reward"] + share * (after["reward"] - before["reward"]))


def gain_ratios(methods: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """[a][b]: the reward gained by a over that gained by b, at the seconds (and at the KL) that both have reached.

    None where b has gained nothing there, so that a ratio would mean nothing.
    """
    table: dict[str, dict[str, dict[str, float | None]]] = {}
    for a, b in permutations(methods, 2):
        curves = methods[a]["curve"], methods[b]["curve"]
        table.setdefault(a, {})[b] = {
            "equal_seconds": _ratio(*curves, "seconds"),
            "equal_kl": _ratio(*curves, PER_ANSWER),
        }
    return table


def _ratio(first: Curve, second: Curve, key: str) -> float | None:
    shared = min(max(point[key] for point in curve) for curve in (first, second))
    reward = reward_at if key == "seconds" else reward_within
    gains = [reward(curve, shared) - curve[0]["reward"] for curve in (first, second)]
    return gains[0] / gains[1] if shared > 0 and gains[1] > 0 else None


def length(plan: Mapping[str, Any]) -> str:
    """How long each training is, as it was asked for.

    >>> length({"steps": 0, "budget_minutes": 0.0, "answers": 640})
    '640 answers'
    """
    units = {"budget_minutes": "minute", "answers": "answer", "steps": "step"}
    return next(shown.several(plan[key], unit) for key, unit in units.items() if plan.get(key))


def table(result: Mapping[str, Any]) -> list[list[tuple[str, str]]]:
    """A row for each method: (name of the column, text)."""
    start = result["start"]
    methods = result["methods"]
    against = yardstick(methods, result["plan"].get("against", "")) or next(iter(methods))
    soon, rows = column(result), []
    for name, method in methods.items():
        end = method["curve"][-1]
        ratios = result["gain_ratios"].get(name, {}).get(against, {})
        ratio = {
            key: "" if (value := ratios.get(f"equal_{key}")) is None else f"{value:.2f}" for key in ("seconds", "kl")
        }
        gain = signed(method["gain"]) if "gain" in method else f"{end['reward'] - start['reward']:+.3f}"
        rows.append(
            [
                ("Method", name),
                ("Seeds", str(method["seeds"])),
                ("Answers", str(method.get("answers", ""))),  # which earlier versions did not count
                ("Learning rate", f"{method['learning_rate']:g}"),
                ("Reward [95 %]", shown.interval(end, "reward")),
                ("Gain", gain),
                ("KL per answer", shown.kl(end[PER_ANSWER])),
                ("Seconds a step", f"{method['seconds_per_step']:.3f}"),
                ("Peak MB", shown.megabytes(method["peak_mb"])),
                ("/ inference", f"{method['peak_mb'] / result['inference_peak_mb']:.3f}"),
                (f"Gain / {against}, equal seconds", ratio["seconds"]),
                ("equal KL", ratio["kl"]),
                *([soon[name]] if soon else []),
            ]
        )
    return rows


def markdown(result: Mapping[str, Any]) -> str:
    """The comparison as a Markdown page: one table, and how to read it."""
    start, the_start = result["start"], shown.start(result.get("sft_steps")).the
    lines = [
        f"{length(result['plan'])} of each method, {result['prompts']} prompts. What all start from has "
        f"reward {shown.interval(start, 'reward')} and a KL to {the_start} of {shown.kl(start[PER_ANSWER])} nats per "
        f"answer. Sampling a batch takes {shown.megabytes(result['inference_peak_mb'])} MB.",
        *reward_model(result),
        "",
        *_markdown_rows(table(result)),
        "",
        *_state_rows(result),
        *difference_rows(result),
        _rates(result),
        "",
        *(f"- {name}: {_searched(method)}" for name, method in result["methods"].items()),
    ]
    lines += [f"- {name} failed: {reason}" for name, reason in result["failed"].items()]
    return "\n".join(lines) + "\n"


def _markdown_rows(cells: Sequence[Sequence[tuple[str, str]]]) -> list[str]:
    head = [f"| {' | '.join(name for name, _ in cells[0])} |", "|---" * len(cells[0]) + "|"]
    return [*head, *(f"| {' | '.join(text for _, text in row)} |" for row in cells)]


def _state_rows(result: Mapping[str, Any]) -> list[str]:
    cells = state_table(result)
    if not cells:
        return []
    return ["What is left of each policy at its end:", "", *_markdown_rows(cells), "", *notes(result), ""]


def _rates(result: Mapping[str, Any]) -> str:
    if not any(method["search"] for method in result["methods"].values()):
        return "Learning rates:"
    beta = f"{result['beta']:g} KL per answer"
    return f"Learning rates were searched by short trainings on other prompts, for the largest reward - {beta}:"


def _searched(method: Mapping[str, Any]) -> str:
    if not method["search"]:
        return f"{method['learning_rate']:g} as configured"
    tried = ", ".join(f"{line['learning_rate']:g} gave {line['objective']:.3f}" for line in method["search"])
    return f"{tried}; chosen {method['learning_rate']:g}"


def reward_model(result: Mapping[str, Any]) -> list[str]:
    """A line on what the one that rewards are by is worth; none where there is no reward model, nor in comparisons of
    earlier versions."""
    quality, refined = result.get("reward_quality"), result["plan"].get("start") == "iteration"
    which = "The reward model, as refined after iteration 0," if refined else "The reward model"
    return [f"{which} on held-out rows: {shown.quality(quality)}."] if quality else []


def text(result: Mapping[str, Any]) -> Page:
    """For a terminal: the table's numbers in columns, and where everything is."""
    names = ("method", "reward", "95 %", "KL per answer", "s/step", "peak MB", "learning rate")
    rows = [names]
    for name, method in result["methods"].items():
        end = method["curve"][-1]
        rows.append(
            (
                name,
                shown.reward(end["reward"]),
                shown.bounds(end, "reward"),
                shown.kl(end[PER_ANSWER]),
                f"{method['seconds_per_step']:.3f}",
                shown.megabytes(method["peak_mb"]),
                f"{method['learning_rate']:g}",
            )
        )
    return Page(
        f"start   reward {shown.reward(result['start']['reward'])}, "
        f"inference {shown.megabytes(result['inference_peak_mb'])} MB",
        *reward_model(result),
        "",
        Table(rows),
        *_state_lines(result),
        *findings(result),
        *(f"{name} failed: {reason}" for name, reason in result["failed"].items()),
        "",
        f"written to {result['out']}: compare.html, compare.md, compare.json and plots",
    )


def _state_lines(result: Mapping[str, Any]) -> list[str | Table]:
    """For a terminal: how soon each method was where one ends, and what is left of each policy."""
    soon, cells = column(result), state_table(result)
    lines: list[str | Table] = []
    if soon:
        title = next(iter(soon.values()))[0]
        lines += ["", Table([("method", title), *((name, said) for name, (_, said) in soon.items())])]
    if cells:
        lines += ["", Table([tuple(name for name, _ in cells[0]), *(tuple(text for _, text in row) for row in cells)])]
    return lines
