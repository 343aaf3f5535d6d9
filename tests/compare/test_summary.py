"""Intervals over prompts and seeds, gains at equal seconds and KL, and the table."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
from matplotlib import rc_context
from matplotlib.figure import Figure

from zopro.analysis.page.drawing import draw, method_style
from zopro.choices import METHODS
from zopro.compare import plots
from zopro.compare.differences import difference_rows, differences
from zopro.compare.page import charts, verdict
from zopro.compare.plots import write_plots
from zopro.compare.reached import answers_at
from zopro.compare.summary import (
    beside,
    gain_ratios,
    markdown,
    method_summary,
    reward_at,
    reward_within,
    start_point,
    text,
)


def curve(*points: tuple[float, float, float]) -> dict[str, Any]:
    """Points of (seconds, reward, kl)."""
    rows = [
        {"step": i, "seconds": s, "reward": r, "reward_low": r - 1, "reward_high": r + 1, "kl_per_answer": k}
        for i, (s, r, k) in enumerate(points)
    ]
    return {"curve": rows, "peak_mb": 1000.0, "seconds_per_step": 0.5, "learning_rate": 1e-4, "seeds": 1, "search": []}


def test_a_method_s_seeds_are_pooled() -> None:
    start = {"rewards": [0.0, 1.0], "kl_per_answer": [0.0, 0.0]}
    results = [
        {
            "points": [{"step": 4, "seconds": s, "rewards": [r, r + 1], "kl_per_answer": [1.0, 3.0]}],
            "peak_mb": 10 * s, "seconds": s, "steps": 4,
        }
        for s, r in ((2.0, 1.0), (4.0, 2.0))
    ]  # fmt: skip
    found = method_summary(results, start)
    assert found["peak_mb"] == 40 and found["seconds_per_step"] == 6 / 8
    first, last = found["curve"]
    assert first == start_point(start) and first["reward"] == 0.5
    assert (last["step"], last["seconds"], last["reward"], last["kl_per_answer"]) == (4, 3.0, 2.0, 2.0)
    assert last["reward_low"] < 2 < last["reward_high"]
    assert found["final_rewards"] == [[1.0, 2.0], [2.0, 3.0]]
    half = 12.7062 * math.sqrt(0.5 / 2)  # each prompt gained alike: only the two seeds differ
    assert found["gain"] == pytest.approx({"mean": 1.5, "low": 1.5 - half, "high": 1.5 + half}, rel=1e-4)


def result(*ends: tuple[int, float, float], prompts: int = 2) -> dict[str, Any]:
    """A training whose points are (step, seconds, reward of each prompt)."""
    points = [
        {"step": n, "seconds": s, "rewards": [r] * prompts, "kl_per_answer": [n / 10] * prompts} for n, s, r in ends
    ]
    return {"points": points, "steps": ends[-1][0], "seconds": ends[-1][1], "peak_mb": 1.0}


def test_a_training_that_a_budget_ended_early_is_in_the_last_point_with_the_others_ends() -> None:
    start = {"rewards": [0.0, 0.0], "kl_per_answer": [0.0, 0.0]}
    long = result((20, 20, 1), (40, 40, 2), (60, 60, 3), (80, 80, 4), (100, 100, 5))
    short = result((20, 33, 1), (40, 66, 2), (47, 100, 3))
    for order in ((long, short), (short, long)):
        found = {**method_summary(order, start), "answers_a_step": 64, "seeds": 2}
        points = [(p["step"], p["seconds"], p["reward"]) for p in found["curve"]]
        assert points == [(0, 0, 0), (20, 26.5, 1), (40, 53, 2), (73.5, 100, 4)]
        end = found["curve"][-1]["reward"]
        assert end == found["gain"]["mean"] == pytest.approx(sum(map(sum, found["final_rewards"])) / 4)
        assert answers_at(found, 73.5) == 73.5 * 64
    other = {**method_summary([result((100, 100, 3.5))] * 2, start), "answers_a_step": 64, "seeds": 2}
    all_of_it = {**beside({"long": found, "other": other}, ""), "start": start_point(start)}
    assert all_of_it["differences"]["long"]["other"]["mean"] == 4 - 3.5
    assert next(verdict(all_of_it)).startswith("Highest reward: long, 4.000")
    old = {**found, "curve": found["curve"][:-1]}
    assert next(verdict({**all_of_it, "methods": {"long": old, "other": other}})).startswith("Highest reward: long")


@pytest.mark.parametrize(
    ("seeds", "prompts", "said"),
    [
        (2, 3, "Clearly more than b (95 %), paired by prompt and seed."),
        (1, 3, "More than b (95 %), paired by prompt; one training each, so nothing about another seed."),
        (1, 1, "No clear difference from b."),
    ],
)
def test_only_several_seeds_say_clearly(seeds: int, prompts: int, said: str) -> None:
    start = {"rewards": [0.0] * prompts, "kl_per_answer": [0.0] * prompts}
    made = {"seeds": seeds, "learning_rate": 1e-4, "search": []}
    methods = {
        name: {**method_summary([result((4, 2.0, reward), prompts=prompts)] * seeds, start), **made}
        for name, reward in (("a", 1.5), ("b", 1.0))
    }
    found = {
        **beside(methods, ""), "start": start_point(start), "plan": {"steps": 4}, "prompts": prompts, "failed": {},
        "inference_peak_mb": 1.0, "beta": 0.05, "out": "x",
    }  # fmt: skip
    assert list(verdict(found))[1:] == [said]
    page = markdown(found)
    assert ("paired by prompt and seed:" in page) == (seeds > 1) and "searched" not in page
    assert ("| a |  | +0.500 |" in page) == (prompts == 1)
    json.dumps(found, allow_nan=False)
    assert [len(chart.shown) for chart in charts(found, {"a": "m1", "b": "m2"})] == [2, 0, 2], "nobody counted answers"
    plots._curves(Figure().add_subplot(), found, "seconds", "")  # of one prompt there is no band


def test_a_method_of_one_training_beside_others_of_several() -> None:
    def said(**seeds: int) -> str:
        methods = {name: {"final_rewards": [[1.0, 2.0]] * count} for name, count in seeds.items()}
        return difference_rows({"methods": methods, "differences": differences(methods)})[0]

    assert said(a=3, b=2).endswith("the column's, paired by prompt and seed:")
    assert "nothing about another seed:" in said(a=3, b=1)
    assert "paired by prompt and seed; a method of one training by prompt alone" in said(a=1, b=2, c=2)


def test_differences_are_paired_by_prompt_and_seed() -> None:
    """Prompts of very unequal rewards, and a difference that all of them show."""
    easy, noise = [0.0, 50.0, 100.0, 7.0], [0.1, -0.1, 0.2, -0.2]
    better = [
        [r + 1 + n for r, n in zip(easy, noise, strict=True)],
        [r + 1 - n for r, n in zip(easy, noise, strict=True)],
    ]
    methods = {"a": {"final_rewards": [*better, easy]}, "b": {"final_rewards": [easy, easy]}, "old": {}}
    found = differences(methods)
    assert found.keys() == {"a", "b"} and found["a"].keys() == {"b"}, "a's third seed has no partner"
    assert found["a"]["b"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    assert found["b"]["a"]["mean"] == pytest.approx(-1.0)
    worse = differences({"a": {"final_rewards": [better[0]]}, "b": {"final_rewards": [easy]}})["a"]["b"]
    assert 0.2 < worse["high"] - worse["mean"] < 0.4, "one seed: what the prompts differ by"


def test_gains_are_read_where_both_have_been() -> None:
    fast, slow = curve((0, 0, 0), (10, 4, 2)), curve((0, 0, 0), (10, 1, 1), (20, 2, 2))
    table = gain_ratios({"fast": fast, "slow": slow})
    assert table["fast"]["slow"] == {"equal_seconds": 4.0, "equal_kl": 2.0}
    assert table["slow"]["fast"]["equal_seconds"] == 0.25
    assert gain_ratios({"a": fast, "b": curve((0, 0, 0), (9, -1, 1))})["a"]["b"]["equal_seconds"] is None
    assert reward_at(slow["curve"], 5) == 0.5 and reward_within(slow["curve"], 9) == 2


def test_a_training_whose_kl_falls_again_is_read_at_its_best() -> None:
    falls, steady = curve((0, 1, 0), (1, 2, 8), (2, 5, 4)), curve((0, 1, 0), (1, 3, 2), (2, 4, 6))
    assert reward_within(falls["curve"], 6) == 5 and reward_within(falls["curve"], 2) == 1.25
    ratio = gain_ratios({"falls": falls, "steady": steady})["steady"]["falls"]["equal_kl"]
    assert ratio == pytest.approx(3 / 4)  # at KL 6


def test_long_ticks_do_not_touch() -> None:
    """A KL of a few hundredths has ticks such as 0.0175."""
    curve = [{"kl_per_answer": kl, "reward": 0.1, "reward_low": 0.0, "reward_high": 0.2} for kl in (0.0, 0.0047, 0.02)]
    with rc_context(plots.STYLE):
        axes = Figure(figsize=plots.SIZE, layout="constrained").add_subplot()
        plots._curves(axes, {"methods": {"mezo": {"curve": curve}}}, "kl_per_answer", "")
        axes.figure.canvas.draw()
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        boxes = [label.get_window_extent() for tick, label in ticks if low <= tick <= high]
    assert len(boxes) > 2 and all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_table_and_plots(tmp_path: Any) -> None:
    methods = {"guided": curve((0, 0, 0), (10, 4, 2)), "rloo": curve((0, 0, 0), (20, 4, 3))}
    paired = {"mean": 1, "low": 0.5, "high": 1.5}
    methods["guided"]["search"] = [{"learning_rate": 1e-4, "reward": 1.0, "kl_per_answer": 0.5, "objective": 0.975}]
    result = {
        "methods": methods, "start": methods["rloo"]["curve"][0], "gain_ratios": gain_ratios(methods), "failed": {},
        "differences": {"guided": {"rloo": paired}, "rloo": {"guided": paired}},
        "plan": {"steps": 40, "budget_minutes": 0.0, "seeds": 1}, "prompts": 100, "inference_peak_mb": 800.0,
        "beta": 0.05, "out": "x",
    }  # fmt: skip
    page = markdown(result)
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows[:3]}) == 1 and len({row.count("|") for row in rows[3:]}) == 1
    assert len(rows) == 3 + 3 and "| guided |  | +1.000 [0.500, 1.500] |" in rows
    assert (
        "| guided | 1 |  | 0.0001 | 4.000 [3.000, 5.000] | +4.000 | 2.00 | 0.500 | 1000 | 1.250 | 2.00 | 1.50 |" in page
    )
    assert page.count("Learning rates were searched by short trainings") == 1
    assert "- guided: 0.0001 gave 0.975; chosen 0.0001" in page and "- rloo: 0.0001 as configured" in page
    terminal = text({**result, "failed": {"mezo": "no memory"}})
    row = next(line.split() for line in terminal.splitlines() if line.startswith("guided"))
    assert row == ["guided", "4.000", "[3.000,", "5.000]", "2.00", "0.500", "1000", "0.0001"], "as in the page's row"
    names = [f"method {i}" for i in range(len(METHODS))]
    axes, many = Figure().add_subplot(), {**result, "methods": dict.fromkeys(names, methods["rloo"])}
    plots._curves(axes, many, "seconds", "")
    drawn = [(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.get_lines()]
    assert len(names) > 7 and len(set(drawn)) == len({(colour, dash) for colour, _, dash in drawn}) == len(names)
    styles = {name: method_style(i) for i, name in enumerate(names)}
    page_lines = draw(Figure(), charts(many, styles)[0]).get_lines()
    seen = {(line.get_color(), line.get_linestyle()) for line in page_lines if line.get_linestyle() != "None"}
    assert len(seen) == len(names), "colour and dash alone tell them apart there"
    paths = write_plots(result, tmp_path)
    assert len(paths) == 6 and all(path.stat().st_size > 2000 for path in paths)
