"""A chart drawn by matplotlib: inline SVG for the page, and the same drawing for files.

Drawn small (360 units wide) so that the labels stay readable when a phone shows the chart at its own width. Inside the
page the colours are those of its style sheet, light or dark, and the font is the reader's own.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import Formatter, LogLocator, MaxNLocator, NullLocator

from zopro.analysis.page.charts import CHANCE, DASHED, FAINT, Chart, Series, number

WIDTH, HEIGHT = 360, 200  # points
MARGINS = {"left": 46 / WIDTH, "right": 350 / WIDTH, "bottom": 34 / HEIGHT, "top": 190 / HEIGHT}
LETTERS = 48  # of all names below a chart; of a long one its end is shown, a quarter of them
# Name -> where the page is light, where it is dark. The style sheet has them by these names; files have the light ones.
SCHEMES = {
    "c1": ("#0a62a8", "#6cb6f5"), "c2": ("#a94b00", "#f0a35e"), "c3": ("#6b3fa0", "#c4a3f0"),
    "c4": ("#0b6b60", "#5fcfbf"),
    "muted": ("#59636e", "#9aa5b1"), "edge": ("#d5dae0", "#343c47"),
    # of methods beside each other, told apart by all (Okabe, Ito)
    "m1": ("#0072b2", "#56a9e0"), "m2": ("#d55e00", "#f58a3c"), "m3": ("#009e73", "#2fce9f"),
    "m4": ("#cc79a7", "#e6a3c8"),
    "m5": ("#e69f00", "#ffc042"), "m6": ("#56b4e9", "#9bd6f7"), "m7": ("#000001", "#f2f2f2"),
}  # fmt: skip
COLOURS = {name: light for name, (light, _) in SCHEMES.items()}
METHODS = tuple(name for name in SCHEMES if name.startswith("m") and name != "muted")
DASHES: Any = (0, (4, 3))
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "zopro",  # the same figure is the same file
    "text.parse_math": False,  # a dollar in a name is a dollar
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "savefig.dpi": 150,
}


def method_style(place: int) -> str:
    """Of the method at that place among others: a colour, and in the second round of colours a dashed line."""
    rounds, colour = divmod(place, len(METHODS))
    return f"{METHODS[colour]} {DASHED}" if rounds % 2 else METHODS[colour]


@contextmanager
def style(**more: Any) -> Iterator[None]:
    """matplotlib's settings for all our figures. Letters that its font lacks are the reader's font's to draw."""
    settings: Any = {**STYLE, **more}
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from font")
        yield


def inline(chart: Chart) -> Markup:
    """The chart as an `<svg>` element, which needs nothing beside the page; empty if it has no finite point."""
    shown = chart.shown
    if not shown:
        return Markup("")
    text = io.StringIO()
    # Marks that a chart refers to by name have names of its own: the page holds many charts.
    with style(**{"svg.hashsalt": ascii(chart.title), "font.size": 11}):
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        figure.subplots_adjust(**MARGINS)
        draw(figure, chart)
        figure.savefig(text, format="svg")
    drawn = text.getvalue()
    body = drawn[drawn.index("<g ") : drawn.rindex("</svg>")]  # without the head, whose style would be all the page's
    body = re.sub(
        r'<g id="dots_(\d+)">.*?</g>', lambda found: _with_titles(found[0], shown[int(found[1])]), body, flags=re.S
    )
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(?<= d=")[^"]*', lambda found: re.sub(r"(\.\d)\d+|\n", r"\1", found[0]), body)
    for name, colour in COLOURS.items():
        body = re.sub(f"((?:fill|stroke): ){colour}", rf"\1var(--{name})", body)
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, HEIGHT, str(chart))
    return opening + Markup(body) + Markup("</svg>")


def clean(words: str) -> str:
    """Without lone surrogates, which data may hold and no font does."""
    return words.encode("utf-8", "replace").decode("utf-8")


def shortened(name: str) -> str:
    """A name below a figure: of a long one its end, which tells checkpoints apart."""
    name, room = clean(name), LETTERS // 4
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _with_titles(group: str, series: Series) -> str:
    """What a pointer over each dot shows."""
    values = map(series.said, range(len(series.points)))
    return re.sub(
        r"<use ([^>]*)/>", lambda use: f"<use {use[1]}><title>{escape(series.name)} {next(values)}</title></use>", group
    )


class Short(Formatter):
    """Ticks by `number`, with the digits that they differ in; `log`: they lie decades apart, and need no more."""

    def __init__(self, log: bool = False) -> None:
        self.log = log

    def __call__(self, value: float, position: int | None = None) -> str:
        return number(value, 0.0)

    def format_ticks(self, values: Any) -> list[str]:
        gap = 0.0 if self.log else min((high - low for low, high in pairwise(values)), default=0.0)
        return [number(value, gap) for value in values]


def draw(figure: Figure, chart: Chart) -> Axes:
    """Draw everything but the title."""
    axes = figure.add_subplot(facecolor="none")
    shown = chart.shown
    for index, series in enumerate(shown):
        _series(axes, series, index)
    _x_axis(axes, chart, [x for series in shown for x, _ in series.points])
    if chart.rule:
        level, name = chart.rule
        axes.axhline(level, color=COLOURS["muted"], linestyle=(0, (5, 3)), linewidth=1, clip_on=False)
        beside: Any = ("axes fraction", "data")
        axes.annotate(clean(name), (1, level), (0, 3), beside, "offset points", ha="right", color=COLOURS["muted"])
    _y_axis(axes, chart, [y for series in shown for _, y in series.points])
    return axes


def _x_axis(axes: Axes, chart: Chart, xs: list[float]) -> None:
    pad = 0.3 if min(xs) == max(xs) else 0.0
    axes.set_xlim(min([*xs, *(x for x, _ in chart.dividers)]) - pad, max(xs) + pad)
    if chart.x_names:
        axes.set_xlim(-0.4, len(chart.x_names) - 0.6)
        names = [*map(shortened, chart.x_names)]
        step = max(1, math.ceil(len(names) / 8), math.ceil(len(names) * max(map(len, names)) / LETTERS))
        axes.set_xticks(range(0, len(names), step), names[::step])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.xaxis.set_major_formatter(Short())
    axes.set_xlabel(clean(chart.x_label), color=COLOURS["muted"])
    for x, name in chart.dividers:
        axes.axvline(x, color=COLOURS["muted"], linestyle=(0, (2, 4)), linewidth=1, clip_on=False)
        above: Any = ("data", "axes fraction")
        axes.annotate(clean(name), (x, 1), (3, -8), above, "offset points", color=COLOURS["muted"])


def _y_axis(axes: Axes, chart: Chart, ys: list[float]) -> None:
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(NullLocator())
    decades = math.log10(max(ys) / min(ys)) if chart.log else 0
    axes.yaxis.set_major_locator(LogLocator(numticks=6) if decades >= 2 else MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(Short(log=decades >= 2))
    axes.margins(y=0.06)
    axes.grid(axis="y", color=COLOURS["edge"], linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)
    axes.tick_params(which="both", length=0, colors=COLOURS["muted"], pad=5)
    axes.set_ylabel(clean(chart.y_label), color=COLOURS["muted"])


def _series(axes: Axes, series: Series, index: int) -> None:
    words = series.style.split()
    faint, level = words[-1] == FAINT, words[0] == CHANCE
    colour = COLOURS[words[1 if level else 0]]
    x, y = zip(*series.points, strict=True)
    if series.band:
        low, high = zip(*series.band, strict=True)
        if series.area:
            axes.fill_between(x, low, high, color=colour, alpha=0.17, linewidth=0, clip_on=False)
        if not level:
            axes.vlines(x, low, high, color=colour, alpha=0.5, linewidth=1, clip_on=False)
    width, alpha = (1.2, 0.75) if level else (1.0, 0.4) if faint else (2.0, 1.0)
    dashes = DASHES if level or words[-1] == DASHED else "-"
    axes.plot(
        x, y, color=colour, linestyle=dashes, linewidth=width, alpha=alpha, clip_on=False, label=clean(series.name),
        solid_joinstyle="round",
    )  # fmt: skip
    if series.dots or len(x) == 1:
        axes.plot(x, y, "o", color=colour, markersize=6, clip_on=False, gid=f"dots_{index}")
