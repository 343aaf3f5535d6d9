"""PNG and SVG of every figure, for papers: drawn by matplotlib, offline and without a browser."""

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
from zopro.analysis.page.drawing import COLOURS, clean, draw, style
from zopro.analysis.page.figures import HeatMap, heat_maps, metric_charts
from zopro.analysis.page.pages import replace_file
from zopro.analysis.reading.records import read_config, read_metrics, start_of

SIDES = {"policy": COLOURS[POLICY], "reward": COLOURS[REWARD]}
Draw = Callable[[Figure], None]


def write_figures(run: Path, folder: Path, numbers: dict[str, Any] | None) -> list[Path]:
    """Draw the curves of `run` (whatever it holds) and the analysis `numbers` into `folder`; return the files."""
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
        size = (1.8 + 0.55 * len(heat.columns), 1.1 + 0.24 * len(heat.rows))
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


def _chart(figure: Figure, chart: Chart) -> None:
    axes = draw(figure, chart)
    axes.set_title(clean(chart.title), fontsize=9)
    if len(chart.shown) > 1:
        axes.legend(frameon=False, fontsize=7)


def _heat(figure: Figure, heat: HeatMap) -> None:
    axes = figure.add_subplot(title=f"{heat.title} ({heat.view})", xlabel="iteration")
    values = np.array([[math.nan if value is None else value for value in row] for _, row in heat.rows])
    limits: Any = {"vmin": heat.middle - heat.reach, "vmax": heat.middle + heat.reach}
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", interpolation="nearest", **limits)
    axes.set_xticks(range(len(heat.columns)), [clean(name) for name in heat.columns])
    axes.set_yticks(range(len(heat.rows)), [clean(name) for name, _ in heat.rows])
    axes.title.set_fontsize(8)
    figure.colorbar(image)


def _trajectory(figure: Figure, data: dict[str, Any], method: str, dimensions: int, view: str) -> None:
    axes: Any = figure.add_subplot(projection="3d" if dimensions == 3 else None)
    axes.set_title(f"{TITLES[method]} of the trajectories, {view}, each from its own start")
    axes.title.set_fontsize(9)
    for name, colour in SIDES.items():
        if name not in data:
            continue
        side = data[name]
        points, others = (np.array(side[kind][f"{dimensions}d"]) for kind in ("points", "predicted"))
        main = side["main"]
        axes.plot(*points.T, "-", color=colour, linewidth=1.2, label="reward model" if name == "reward" else name)
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
