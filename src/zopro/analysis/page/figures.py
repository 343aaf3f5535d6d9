"""What the figures of an analysis show, as plain data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from zopro.analysis.numbers.summary import PROCRUSTES
from zopro.analysis.page.charts import CHANCE, FACTORS, PRODUCT, Chart, Series, digits_of

Numbers = dict[str, Any]

LABELS = {
    "update_angle_degrees": "Angle between updates, degrees",
    "velocity_angle_degrees": "Angle between velocities, degrees",
    "update_pearson": "Pearson correlation of updates",
    "update_distance_correlation": "Distance correlation of updates",
    "policy_momentum_cosine": "Policy: cosine with the update before",
    "reward_momentum_cosine": "Reward model: cosine with the update before",
    "policy_extrapolation_error": "Policy: error of the straight line, in steps",
    "reward_extrapolation_error": "Reward model: error of the straight line, in steps",
    "policy_update_norm": "Policy: length of the update",
    "reward_update_norm": "Reward model: length of the update",
    PROCRUSTES: "Procrustes disparity of the trajectories",
}
STYLES = {"factors": FACTORS, "product": PRODUCT}


def metric_charts(numbers: Numbers) -> list[Chart]:
    """One chart for each metric: a line for each view with its bootstrap interval, and what chance would give."""
    names = [str(iteration) for iteration in numbers["iterations"]]
    charts = []
    for name, label in LABELS.items():
        if name == PROCRUSTES or name not in numbers["metrics"]:
            continue
        series = [line for view in numbers["views"] for line in _lines(numbers, name, view, STYLES[view])]
        charts.append(Chart(label, series, "iteration", x_names=names))
    return charts


def _lines(numbers: Numbers, name: str, view: str, style: str) -> Iterator[Series]:
    values = numbers["metrics"][name][view]
    here = [(float(i), value) for i, value in enumerate(values) if value is not None]
    if not here:
        return
    band, digits = numbers["chance"].get(name, {}).get(view), decimals(numbers, name, view)
    if band is not None:
        levels = [(x, band["expected"][int(x)], band["low"][int(x)], band["high"][int(x)]) for x, _ in here]
        levels = [(levels[0][0] - 0.3, *levels[0][1:]), *levels, (levels[-1][0] + 0.3, *levels[-1][1:])]
        points = [(x, expected) for x, expected, _, _ in levels]
        edges = [(low, high) for *_, low, high in levels]
        yield Series(f"{view} by chance", points, edges, f"{CHANCE} {style}", digits=digits)
    intervals = numbers["intervals"].get(name, {}).get(view)
    whiskers = [intervals[int(x)] or (value, value) for x, value in here] if intervals else []
    yield Series(view, here, [(low, high) for low, high in whiskers], style, dots=True, area=False, digits=digits)


@dataclass(frozen=True)
class HeatMap:
    """Groups (layers, or modules) by iterations; `middle` is what chance gives, `reach` the largest distance from it, of
    which `digits` after the point show two, and no fewer than `least`."""

    title: str
    view: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[float | None]]]
    middle: float
    least: int

    @property
    def reach(self) -> float:
        return (
            max((abs(value - self.middle) for _, row in self.rows for value in row if value is not None), default=0) or 1
        )

    @property
    def digits(self) -> int:
        return digits_of(self.reach, self.least)

    def share(self, value: float) -> float:
        """-1 ... 1: how far from the middle."""
        return (value - self.middle) / self.reach


HEAT = (
    ("update_angle_degrees", 90.0, 1),
    ("policy_momentum_cosine", 0.0, 3),
    ("reward_momentum_cosine", 0.0, 3),
)


def heat_maps(numbers: Numbers) -> list[HeatMap]:
    """By layer and by module type, in each view."""
    columns = [str(iteration) for iteration in numbers["iterations"]]
    maps = []
    for name, middle, least in HEAT:
        for key in ("layer", "module"):
            for view in numbers["views"]:
                rows = list(numbers[f"by_{key}"][view][name].items())
                if len(rows) > 1 and any(value is not None for _, row in rows for value in row):
                    maps.append(HeatMap(f"{LABELS[name]}, by {key}", view, columns, rows, middle, least))
    return maps


@dataclass(frozen=True)
class TableRow:
    """One metric of one view, for the table of all numbers; cells are texts."""

    name: str
    view: str
    cells: Sequence[str]
    intervals: Sequence[str]
    permutation: Sequence[str]
    chance: str


def table(numbers: Numbers, tables: Numbers) -> list[TableRow]:
    """All metrics of `tables` (the analysis itself, or its off_by_one) as text."""
    rows = []
    for name in LABELS:
        for view, values in tables["metrics"].get(name, {}).items():
            single = not isinstance(values, list)
            pairs = [
                ([_of(tables, key, name, view)] if single else _of(tables, key, name, view)) or []
                for key in ("intervals", "permutation")
            ]
            digits = decimals(tables, name, view)
            texts = [[span(pair, digits) for pair in column] for column in pairs]
            level = span(band_of(tables, name, view), digits)
            cells = [short(value, digits) for value in ([values] if single else values)]
            if not numbers["reward"] and set(cells) == {short(None)}:
                continue  # about a reward model that there is not
            rows.append(TableRow(name, view, cells, texts[0], texts[1], level))
    return rows


def _of(tables: Numbers, key: str, name: str, view: str) -> Any:
    return tables[key].get(name, {}).get(view)


def band_of(tables: Numbers, name: str, view: str) -> tuple[float, float] | None:
    """What chance gives; of bands that differ between iterations the last one that is defined."""
    band = _of(tables, "chance", name, view) or {}
    low, high = (_last(band.get(edge)) for edge in ("low", "high"))
    return None if low is None or high is None else (low, high)


def _last(value: Any) -> Any:
    return next((one for one in reversed(value) if one is not None), None) if isinstance(value, list) else value


def decimals(tables: Numbers, name: str, view: str) -> int | None:
    """Digits after the point of an angle, which says something by its distance from 90 degrees: two of the chance band's
    half width, and no fewer than two. None of what lies around 0, whose significant digits say as much."""
    if not name.endswith("_degrees"):
        return None
    band = band_of(tables, name, view)
    return digits_of(band and (band[1] - band[0]) / 2, 2)


def short(value: float | None, digits: int | None = None) -> str:
    """So many digits after the point, or four significant ones; what is not defined is a dash."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:.4g}" if digits is None else f"{value:.{digits}f}"


def span(pair: Sequence[float] | None, digits: int | None = None) -> str:
    return "" if pair is None else f"{short(pair[0], digits)} to {short(pair[1], digits)}"
