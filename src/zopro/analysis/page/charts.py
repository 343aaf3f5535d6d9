"""What a line chart shows, as plain data; `zopro.analysis.page.drawing` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

MAX_POINTS = 400
CHANCE = "chance"  # a style that begins so is a dashed level with a shaded band around it, without whiskers
FAINT = "faint"  # a style that ends so is a thin line behind another one
POLICY, REWARD, FACTORS, PRODUCT = "c1", "c2", "c3", "c4"
"""Colours by what they mean, on every chart: the policy, the reward model, and the two views of an analysis."""
ZERO = 1e-6  # below it a curve is at zero


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y); `band`, if given, holds a (low, high) beside every point."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    style: str = POLICY
    dots: bool = False
    area: bool = True  # shade the band; without it only whiskers show it


@dataclass(frozen=True)
class Chart:
    """What a chart shows. `rule` is a labelled horizontal line; `dividers` are labelled vertical ones."""

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str = ""
    x_names: Sequence[str] = ()
    rule: tuple[float, str] | None = None
    dividers: Sequence[tuple[float, str]] = field(default_factory=tuple)
    log: bool = False

    @property
    def shown(self) -> list[Series]:
        """What can be drawn: finite points, long lines thinned; a series without any is left out."""
        return [series for series in (_clean(series, self.log) for series in self.series) if series.points]

    @property
    def flat(self) -> bool:
        """Whether it would show nothing but zeros."""
        return all(abs(y) < ZERO for series in self.shown for _, y in series.points)

    def __str__(self) -> str:
        """In words, for those who do not see it."""
        ends = "; ".join(f"{s.name}: {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in self.shown)
        return f"{self.title}. {ends}"


def number(value: float) -> str:
    """A short number for a label: three significant digits, thousands as k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _clean(series: Series, log: bool) -> Series:
    """Drop points that cannot be drawn, then thin long lines by averaging neighbours."""
    bands: Sequence[tuple[float, float] | None] = series.band or [None] * len(series.points)
    kept = [
        (*point, *(band or ()))
        for point, band in zip(series.points, bands, strict=True)
        if all(map(math.isfinite, point)) and not (log and point[1] <= 0) and (not band or all(map(math.isfinite, band)))
    ]
    if len(kept) > MAX_POINTS:
        size = math.ceil(len(kept) / MAX_POINTS)
        chunks = [kept[i : i + size] for i in range(0, len(kept), size)]
        kept = [tuple(sum(numbers) / len(chunk) for numbers in zip(*chunk, strict=True)) for chunk in chunks]
    bounds = [(row[2], row[3]) for row in kept if len(row) > 2]
    return replace(series, points=[(row[0], row[1]) for row in kept], band=bounds)


def running_mean(points: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean of the last `window` values at every x; shorter at the start."""
    finite = [point for point in points if math.isfinite(point[1])]
    sums = [0.0]
    for _, y in finite:
        sums.append(sums[-1] + y)
    starts = [max(0, i + 1 - window) for i in range(len(finite))]
    return [(x, (sums[i + 1] - sums[s]) / (i + 1 - s)) for i, ((x, _), s) in enumerate(zip(finite, starts, strict=True))]


def boundaries(lengths: Sequence[float]) -> list[float]:
    """Where pieces laid end to end begin: [0, l0, l0 + l1, ...], without the end of the last."""
    starts = [0.0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return [low for low, _ in pairwise(starts)]
