"""What a line chart shows, as plain data; `zopro.analysis.page.drawing` draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from itertools import pairwise

MAX_POINTS = 400
CHANCE = "chance"  # a style that begins so is a dashed level with a shaded band around it, without whiskers
FAINT = "faint"  # a style that ends so is a thin line behind another one
DASHED = "dashed"  # a style that ends so is a dashed line
POLICY, REWARD, FACTORS, PRODUCT = "c1", "c2", "c3", "c4"
"""Colours by what they mean, on every chart: the policy, the reward model, and the two views of an analysis."""
ZERO = 1e-6  # below it a curve is at zero


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y); `band`, if given, holds a (low, high) beside every point.

    digits: after the point, of a value in words; None: three significant ones.
    """

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    style: str = POLICY
    dots: bool = False
    area: bool = True  # shade the band; without it only whiskers show it
    digits: int | None = None

    def said(self, place: int) -> str:
        """The value of a point in words."""
        return self._said(self.points[place][1])

    def _said(self, value: float) -> str:
        return number(value) if self.digits is None else f"{value:.{self.digits}f}"

    def __str__(self) -> str:
        """First and last value in words, with the last one's interval; of what chance gives its last band."""
        low, high = map(self._said, self.band[-1] if self.band else (0, 0))
        if self.style.startswith(CHANCE):
            return f"{low} to {high}"
        return f"{self.said(0)} to {self.said(-1)}" + f" [{low}, {high}]" * (low != high)


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
        if [series.name for series in self.shown] == [self.title]:
            return f"{self.title}: {self.shown[0]}"
        return f"{self.title}. {'; '.join(f'{series.name}: {series}' for series in self.shown)}"


def number(value: float, step: float = 0.0) -> str:
    """A short number for a label: three significant digits, thousands as k; of ticks `step` apart as many as differ.

    >>> number(90.05), number(90.05, 0.05), number(10_250, 250), number(9999.7)
    ('90', '90.05', '10.25k', '9999.7')
    """
    scale, unit = (1000, "k") if abs(value) >= 10_000 else (1, "")
    value, decimals = value / scale, _decimals(step / scale)
    whole = min(7, len(str(round(abs(value)))))
    return f"{value:.{max(3, whole + decimals)}g}{unit}"


def _decimals(step: float) -> int:
    """Digits after the point of a step between ticks, which has two significant digits at most."""
    return max(0, -int(Decimal(f"{step:.2g}").normalize().as_tuple().exponent)) if step else 0


def digits_of(width: float | None, least: int) -> int:
    """Digits after the point that give `width` two digits, and no fewer than `least`.

    >>> digits_of(0.0112, 2), digits_of(5.0, 2), digits_of(None, 2)
    (3, 2, 2)
    """
    return max(least, 1 - math.floor(math.log10(width))) if width else least


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
