"""PNG and SVG of every figure, for papers: drawn by matplotlib, offline and without a browser.

In a PCA a side that is a tenth of the other or less is drawn larger, and the legend says how many times.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zopro.analysis.numbers.projection import TITLES
from zopro.analysis.page.charts import POLICY, REWARD, Chart
from zopro.analysis.page.curves import run_charts
from zopro.analysis.page.drawing import COLOURS, clean, draw, shortened, style
from zopro.analysis.page.figures import LABELS, HeatMap, heat_maps, metric_charts
from zopro.analysis.page.pages import replace_file
from zopro.analysis.reading.records import read_config, read_metrics, start_of

SIDES = {"policy": COLOURS[POLICY], "reward": COLOURS[REWARD]}
Draw = Callable[[Figure], None]


def write_figures(run: Path, folder: Path, numbers: dict[str, Any] | None) -> list[Path]:
    """Draw the curves of `run` (whatever it holds) and the analysis `numbers` into `folder`; return the files.

    Figures that an earlier analysis left there and this one does not have are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with style():
        for name, size, fill in figures(run, numbers):
            figure = Figure(figsize=size, layout="constrained")
            FigureCanvasAgg(figure)
            fill(figure)
            figure.draw_without_rendering()
            figure.set_layout_engine(None)  # arranged once, for both files; with "none" each would be drawn twice
            for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                drawn = io.BytesIO()
                figure.savefig(drawn, format=suffix, metadata=metadata)
                written.append(replace_file(folder / f"{name}.{suffix}", drawn.getvalue()))
    for file in {*folder.glob("*.png"), *folder.glob("*.svg")}.difference(written):
        if file.name.startswith(OF_ANALYSIS):
            file.unlink()
    return written


def figures(run: Path, numbers: dict[str, Any] | None) -> Iterator[tuple[str, tuple[float, float], Draw]]:
    """Name, size in inches and drawing of each figure."""
    for chart in run_charts(read_metrics(run), start_of(read_config(run))):
        if not chart.flat:
            yield slug(chart.title), (4.5, 2.9), partial(_chart, chart=chart)
    if numbers is None:
        return
    for chart in metric_charts(numbers):
        if not chart.flat:
            yield slug(chart.title), (4.5, 2.9), partial(_chart, chart=chart)
    for heat in heat_maps(numbers):
        widest = max(len(name) for name, _ in heat.rows)
        size = (max(4.5, 1.3 + 0.08 * widest + 0.55 * len(heat.columns)), 1.9 + 0.24 * len(heat.rows))
        yield slug(f"{heat.title} {heat.view}"), size, partial(_heat, heat=heat)
    for view, methods in numbers["trajectories"].items():
        for method, data in methods.items():
            for dimensions in (2, 3):
                yield (
                    f"trajectory-{method}-{dimensions}d-{view}",
                    (5.2, 4.2),
                    partial(_trajectory, data=data, method=method, dimensions=dimensions, view=view),
                )


def slug(title: str) -> str:
    """A title as a file name.

    >>> slug("Held-out reward, 95 % interval")
    'held-out-reward-95-interval'
    """
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


OF_ANALYSIS = (*(f"trajectory-{method}-" for method in TITLES), *map(slug, LABELS.values()))
"""How the names of figures begin that are an analysis's, and not a run's curves."""


def _chart(figure: Figure, chart: Chart) -> None:
    axes = draw(figure, chart)
    axes.set_title(clean(chart.title), fontsize=9)
    if len(chart.shown) > 1:
        handles = axes.get_legend_handles_labels()
        figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False, fontsize=7)


def _heat(figure: Figure, heat: HeatMap) -> None:
    axes = figure.add_subplot(facecolor=COLOURS["edge"])
    values = np.array([[math.nan if value is None else value for value in row] for _, row in heat.rows])
    limits: Any = {"vmin": heat.middle - heat.reach, "vmax": heat.middle + heat.reach}
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", interpolation="nearest", **limits)
    axes.set_xlabel("iteration" + " (grey: not defined)" * bool(np.isnan(values).any()))
    names = [*map(shortened, heat.columns)]
    axes.set_xticks(range(len(names)), names, rotation=90 if max(map(len, names)) > 4 else 0)
    axes.set_yticks(range(len(heat.rows)), [clean(name) for name, _ in heat.rows])
    figure.suptitle(f"{heat.title} ({heat.view})", fontsize=8)
    figure.colorbar(image)


def _trajectory(figure: Figure, data: dict[str, Any], method: str, dimensions: int, view: str) -> None:
    axes: Any = figure.add_subplot(projection="3d" if dimensions == 3 else None)
    axes.set_title(f"{TITLES[method]} of the trajectories, {view}, each from its own start")
    axes.title.set_fontsize(9)
    kinds = ("points", "predicted")
    sides = {name: [np.array(data[name][kind][f"{dimensions}d"]) for kind in kinds] for name in SIDES if name in data}
    extents = {name: float(np.ptp(points, axis=0).max()) for name, (points, _) in sides.items()}
    largest = max(extents.values()) or 1.0
    for name, (points, others) in sides.items():
        colour, main, title = SIDES[name], data[name]["main"], "reward model" if name == "reward" else name
        if method == "pca" and 1e-6 < extents[name] / largest <= 0.1:  # below it is rounding
            times = 10 ** math.floor(math.log10(largest / extents[name]))
            points, others = (points[0] + times * (placed - points[0]) for placed in (points, others))
            title += f", {times} times as large"
        axes.plot(*points.T, "-", color=colour, linewidth=1.2, label=title)
        axes.plot(*points[main].T, "o", color=colour, markersize=3.5)
        axes.plot(*points[:1].T, "o", color=colour, markersize=8, markerfacecolor="none")
        axes.plot(*points[-1:].T, "s", color=colour, markersize=7)
        for position, predicted in zip(main[1:], others, strict=True):
            axes.plot(*np.stack([points[position], predicted]).T, "--", color=colour, linewidth=0.8, alpha=0.7)
    if method == "pca":
        for axis, share in zip("xyz"[:dimensions], data["explained_variance"], strict=False):
            getattr(axes, f"set_{axis}label")(f"PC {'xyz'.index(axis) + 1} ({100 * (share or 0):.0f} %)")
        if dimensions == 2:
            axes.set_aspect("equal", adjustable="datalim")
    axes.plot([], [], "--", color="#777777", linewidth=0.8, label="the last step repeated")
    axes.plot([], [], "o", color="#777777", markerfacecolor="none", label="start")
    axes.plot([], [], "s", color="#777777", label="end")
    axes.legend(frameon=False, fontsize=7)
