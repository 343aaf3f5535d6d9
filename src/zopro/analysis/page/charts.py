"""Line charts as inline SVG: no script, no font, no file beside the page, colours from the page's style sheet.

Drawn small (360 units wide) so that the labels stay readable when a phone shows the chart at its own width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from markupsafe import Markup, escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 34
MAX_POINTS = 400
CHANCE = "chance"  # a style that begins so is a dashed level with a shaded band around it, without whiskers


@dataclass(frozen=True)
class Series:
    """One line: `points` are (x, y); `band`, if given, holds a (low, high) beside every point."""

    name: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float]] = ()
    style: str = "c1"
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

    def svg(self) -> Markup:
        """Return the chart as an `<svg>` element, or an empty string if it has no finite point."""
        shown = [_clean(series, self.log) for series in self.series]
        shown = [series for series in shown if series.points]
        if not shown:
            return Markup("")
        scale = _Scale.around(shown, self.rule[0] if self.rule else None, self.log, bool(self.x_names))
        parts = [*self._frame(scale), *(part for series in shown for part in _draw(series, scale))]
        ends = "; ".join(f"{s.name}: {number(s.points[0][1])} to {number(s.points[-1][1])}" for s in shown)
        return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
            WIDTH, HEIGHT, f"{self.title}. {ends}", Markup("").join(parts)
        )

    def _frame(self, scale: _Scale) -> list[Markup]:
        right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = []
        for tick in scale.y_ticks():
            y = scale.y(tick)
            parts.append(_line("grid", LEFT, y, right, y))
            parts.append(_text(LEFT - 5, y + 3.5, number(tick), "end"))
        if self.x_names:
            step = max(1, math.ceil(len(self.x_names) / 8))
            ticks = [(float(i), name) for i, name in enumerate(self.x_names) if i % step == 0]
        else:
            ticks = [(tick, number(tick)) for tick in nice_ticks(scale.x_low, scale.x_high, 5)]
        parts += [_text(scale.x(x), bottom + 14, name, "middle") for x, name in ticks]
        parts.append(_text((LEFT + right) / 2, HEIGHT - 4, self.x_label, "middle"))
        for x, name in self.dividers:
            parts.append(_line("divider", scale.x(x), TOP, scale.x(x), bottom))
            parts.append(_text(scale.x(x) + 3, TOP + 8, name, "start"))
        if self.rule:
            y = scale.y(self.rule[0])
            parts.append(_line("rule", LEFT, y, right, y))
            parts.append(_text(right, y - 3, self.rule[1], "end"))
        return parts


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log: bool

    @classmethod
    def around(cls, series: Sequence[Series], rule: float | None, log: bool, named: bool) -> _Scale:
        xs = [x for s in series for x, _ in s.points]
        ys = [y for s in series for _, y in s.points] + [edge for s in series for pair in s.band for edge in pair]
        ys += [] if rule is None else [rule]
        x_pad = 0.3 if named or min(xs) == max(xs) else 0.0
        y_low, y_high = (math.log10(min(ys)), math.log10(max(ys))) if log else (min(ys), max(ys))
        y_pad = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
        return cls(min(xs) - x_pad, max(xs) + x_pad, y_low - y_pad, y_high + y_pad, log)

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def y_ticks(self) -> list[float]:
        if self.log:
            decades = [10.0**k for k in range(math.ceil(self.y_low), math.floor(self.y_high) + 1)]
            if len(decades) >= 2:
                return decades[:: math.ceil(len(decades) / 5)]
            return [10**tick for tick in nice_ticks(self.y_low, self.y_high, 4)]
        return nice_ticks(self.y_low, self.y_high, 5)


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` round numbers in [low, high].

    >>> nice_ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """A short number for a label: three significant digits, thousands as k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _clean(series: Series, log: bool) -> Series:
    """Drop points that cannot be drawn, then thin long lines by averaging neighbours."""
    bands: Sequence[tuple[float, float] | None] = series.band or [None] * len(series.points)
    kept = [
        (point, band)
        for point, band in zip(series.points, bands, strict=True)
        if all(map(math.isfinite, point)) and not (log and point[1] <= 0) and (not band or all(map(math.isfinite, band)))
    ]
    points = [point for point, _ in kept]
    if len(points) > MAX_POINTS:
        size = math.ceil(len(points) / MAX_POINTS)
        chunks = [points[i : i + size] for i in range(0, len(points), size)]
        points = [(sum(x for x, _ in c) / len(c), sum(y for _, y in c) / len(c)) for c in chunks]
    return replace(series, points=points, band=[band for _, band in kept if band])


def _draw(series: Series, scale: _Scale) -> list[Markup]:
    parts = []
    at = [(scale.x(x), scale.y(y)) for x, y in series.points]
    if series.band:
        edges = [(x, scale.y(low), scale.y(high)) for (x, _), (low, high) in zip(at, series.band, strict=True)]
        outline = [(x, high) for x, _, high in edges] + [(x, low) for x, low, _ in reversed(edges)]
        if series.area:
            parts.append(Markup('<polygon class="{} band" points="{}"/>').format(series.style, _path(outline)))
        if not series.style.startswith(CHANCE):
            parts += [_line(f"{series.style} whisker", x, low, x, high) for x, low, high in edges]
    if len(at) > 1:
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(series.style, _path(at)))
    if series.dots or len(at) == 1:
        for (x, y), (_, value) in zip(at, series.points, strict=True):
            parts.append(
                Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>').format(
                    series.style, x, y, f"{series.name} {number(value)}"
                )
            )
    return parts


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _line(style: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(style, x1, y1, x2, y2)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, escape(text))


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
