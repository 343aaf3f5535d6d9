"""Angles near 90 degrees keep the digits that say something, wherever they stand, and are read beside chance."""

from __future__ import annotations

import re
from typing import Any

import pytest
from matplotlib.figure import Figure

from zopro.analysis import command
from zopro.analysis.page.charts import Chart, Series
from zopro.analysis.page.drawing import draw, inline
from zopro.analysis.page.figures import heat_maps, metric_charts, table
from zopro.analysis.page.findings import findings

ANGLE, COSINE = "update_angle_degrees", "policy_momentum_cosine"
THEIRS = ("reward_momentum_cosine", "policy_extrapolation_error", "reward_extrapolation_error")
TOLD = ("velocity_angle_degrees", "update_pearson", "update_distance_correlation", COSINE, *THEIRS)


def of(name: str, values: list[Any], middle: float, half: float, unrelated: list[Any] | None = None) -> dict[str, Any]:
    """An analysis with one metric, and chance `half` on either side of the middle."""
    count = len(values)
    metrics: dict[str, Any] = {key: {"product": [None] * count} for key in (ANGLE, *TOLD)}
    metrics |= {name: {"product": values}, "procrustes_disparity": {"product": None}}
    band = {"expected": [middle] * count, "low": [middle - half] * count, "high": [middle + half] * count}
    return {
        "views": ["product"], "iterations": list(range(count)), "reward": ["r"], "left_out": {}, "tensors": 9,
        "dimension": {"product": 10**9}, "metrics": metrics, "chance": {name: {"product": band}},
        "permutation": {name: {"product": unrelated}} if unrelated else {},
        "intervals": {name: {"product": [[value - half / 2, value + half / 2] for value in values]}},
    }  # fmt: skip


def ticks(chart: Chart) -> list[str]:
    figure = Figure(figsize=(5, 3))
    axes = draw(figure, chart)
    figure.draw_without_rendering()
    return [tick.get_text() for tick in axes.get_yticklabels()]


def test_ticks_and_tooltips_tell_them_apart() -> None:
    (chart,) = (chart for chart in metric_charts(of(ANGLE, [90.03, 89.97, 90.01], 90.0, 0.0112)) if chart.shown)
    labels, svg = ticks(chart), str(inline(chart))
    assert len(set(labels)) == len(labels) > 2
    assert re.findall("<title>product (.*?)</title>", svg) == ["90.030", "89.970", "90.010"]
    assert "product: 90.030 to 90.010" in svg


@pytest.mark.parametrize(
    ("values", "wanted"),
    [([89.9, 90.1], ["89.9", "89.95", "90", "90.05", "90.1"]), ([10_000, 11_000], ["10k", "10.25k", "10.5k"])],
)
def test_ticks_say_where_they_lie(values: list[float], wanted: list[str]) -> None:
    labels = ticks(Chart("t", [Series("s", [*enumerate(values)])], "x"))
    assert [label for label in labels if label in wanted] == wanted and len(set(labels)) == len(labels)


def test_tables_tell_chance_from_what_it_does_not_give() -> None:
    numbers = of(ANGLE, [90.004, 90.001], 90.0, 0.0035, [[89.996, 90.0042], None])
    row = next(row for row in table(numbers, numbers) if row.name == ANGLE)
    assert row.cells == ["90.0040", "90.0010"] and row.chance == "89.9965 to 90.0035"
    assert row.permutation == ["89.9960 to 90.0042", ""] and row.intervals[0] == "90.0023 to 90.0058"
    rows = next(page.rows for page in command._text(numbers, {"report": "r"}) if not isinstance(page, str))
    assert [row[0] for row in rows[1:]] == [ANGLE, *TOLD, "procrustes_disparity"], "of both what the sentences are about"
    assert [*rows[1]] == [ANGLE, "90.0040", "90.0010", "89.9965 to 90.0035"]
    cosines = of(COSINE, [0.5, 1e-4], 0.0, 1e-3)
    assert next(row for row in table(cosines, cosines) if row.name == COSINE).cells == ["0.5", "0.0001"]


def test_heat_maps_show_two_digits_of_the_farthest() -> None:
    layers = {"layer 0": [90.01], "layer 1": [89.98]}
    nothing: dict[str, Any] = {key: {} for key in (COSINE, "reward_momentum_cosine")}
    numbers = {"views": ["product"], "iterations": [0], "by_module": {"product": {ANGLE: {}, **nothing}}}
    (heat,) = heat_maps({**numbers, "by_layer": {"product": {ANGLE: layers, **nothing}}})
    assert heat.digits == 3
    layers["layer 1"] = [80.0]
    (heat,) = heat_maps({**numbers, "by_layer": {"product": {ANGLE: layers, **nothing}}})
    assert heat.digits == 1


@pytest.mark.parametrize(
    ("angle", "said"),
    [
        (90.46, "at 90.46 degrees to each other, which is what unrelated updates give by chance."),
        (91.0, "to each other, beyond what unrelated updates give (1 in 20 is by chance)."),
    ],
)
def test_what_the_permutation_gives_is_no_finding(angle: float, said: str) -> None:
    assert said in findings(of(ANGLE, [angle], 90.0, 0.34, [[89.5, 90.49]]))


def test_a_side_that_did_not_move_is_named() -> None:
    numbers = of(COSINE, [0.9, 0.5], 0.0, 0.01)
    assert "did not move" not in findings(numbers)
    lengths = {"policy": [1.0, 0.0], "reward": [0.0, 0.0]}
    numbers["metrics"] |= {f"{side}_update_norm": {"product": values} for side, values in lengths.items()}
    said = "The policy did not move in 1 of 2 iterations. The reward model did not move. The policy keeps"
    assert findings(numbers).startswith(said)


def test_a_direction_that_unrelated_updates_have_too_is_not_kept() -> None:
    assert "does not keep" in findings(of(COSINE, [0.79, 0.5], 0.0, 0.01, [[-0.8, 0.8]] * 2))
    said = findings(of(COSINE, [0.9, 0.5], 0.0, 0.01, [[-0.8, 0.8]] * 2))
    assert "partly keeps its direction" in said
    assert "beyond what unrelated updates give onwards in 1 of 2 iterations, 1 in 40 by chance" in said
    assert "The policy keeps its direction" in findings(of(COSINE, [0.9, 0.5], 0.0, 0.01)), "too few tensors to permute"


@pytest.mark.parametrize(
    ("cosines", "said"),
    [
        ([-0.9, -0.5], "The policy turns back from one update to the next (cosine -0.90 to -0.50, by chance 0)."),
        ([-0.9, 0.0], "partly turns back from one update to the next (cosine -0.90 to 0.00, by chance 0; beyond what "
         "unrelated updates give backwards in 1 of 2 iterations, 1 in 40 by chance)."),
        ([-0.9, 0.9], "partly keeps its direction from one update to the next (cosine -0.90 to 0.90, by chance 0; beyond "
         "what unrelated updates give onwards in 1 and backwards in 1 of 2 iterations, 1 in 40 by chance)."),
        ([0.21, 0.22], "The policy keeps a little of its direction from one update to the next (cosine 0.21 to 0.22, "),
        ([-0.21, 0.0], "turns back a little from one update to the next (cosine -0.21 to 0.00, by chance 0; beyond what "
         "unrelated updates give backwards in 1 of 2 iterations, 1 in 40 by chance)."),
        ([0.0, 0.005], "does not keep its direction from one update to the next (cosine 0.00 to 0.01, by chance 0)."),
    ],
)  # fmt: skip
def test_updates_that_go_back_are_counted(cosines: list[float], said: str) -> None:
    assert said in findings(of(COSINE, cosines, 0.0, 0.01))
