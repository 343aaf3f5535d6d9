"""Figures for papers: all that is written lies inside and apart, and what is not defined or too small to see is told."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zopro.analysis.page import static
from zopro.analysis.page.charts import Chart, Series
from zopro.analysis.page.drawing import COLOURS, style
from zopro.analysis.page.figures import HEAT, LABELS, HeatMap

NAMES = [f"checkpoint-{step}" for step in range(100, 900, 100)]


def drawn(size: tuple[float, float], draw: Callable[[Figure], None]) -> Figure:
    with style():
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.draw_without_rendering()
    return figure


def heat_map(monkeypatch: pytest.MonkeyPatch, columns: list[str], rows: dict[str, list[Any]]) -> Figure:
    """Of the longest title, in the size that it is given."""
    title = max((f"{LABELS[name]}, by module" for name, *_ in HEAT), key=len)
    heat = HeatMap(title, "product", columns, [*rows.items()], 0.0, 3)
    with monkeypatch.context() as patch:
        patch.setattr(static, "heat_maps", lambda numbers: [heat])
        patch.setattr(static, "metric_charts", lambda numbers: [])
        ((_, size, draw),) = static.figures(Path("absent"), {"trajectories": {}})
    return drawn(size, draw)


def lines(names: list[str]) -> Figure:
    title = max(LABELS.values(), key=len)
    points = [(float(i), 1.0 + i) for i in range(len(names))]
    named = [f"{view}{more}" for view in ("factors", "product") for more in (" by chance", "")]
    chart = Chart(title, [Series(name, points) for name in named], "iteration", x_names=names)
    return drawn((4.5, 2.9), lambda figure: static._chart(figure, chart))


def legible(figure: Figure) -> bool:
    """Every text lies inside of the figure, and none on another one."""
    axes = figure.axes[0]
    spans = (axes.xaxis, sorted(axes.get_xlim())), (axes.yaxis, sorted(axes.get_ylim()))
    ticks = [
        tick.label1 for axis, (low, high) in spans for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
    ]
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    texts = [figure._suptitle or axes.title, axes.xaxis.label, *ticks, *legends]
    boxes = [text.get_window_extent() for text in texts if text.get_text()]
    assert len(ticks) > 3
    inside = all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
    return inside and not any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize("columns", [["0"], ["0", "1", "2"], NAMES[:2], NAMES])
def test_all_that_is_written_can_be_read(monkeypatch: pytest.MonkeyPatch, columns: list[str]) -> None:
    rows = {name: [0.1] * len(columns) for name in ("layer 0", "a_projection_of_a_long_name", "down_proj")}
    assert legible(heat_map(monkeypatch, columns, rows))
    assert legible(lines(columns))


def test_a_cell_that_is_not_defined_is_no_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    figure = heat_map(monkeypatch, ["0", "1"], {"a": [None, 0.1], "b": [None, 0.0]})
    axes = figure.axes[0]
    grey = matplotlib.colors.to_rgba(COLOURS["edge"])
    assert axes.get_xlabel() == "iteration (grey: not defined)" and axes.get_facecolor() == grey
    (image,) = axes.images
    cells = image.to_rgba(image.get_array())
    assert cells[0, 0, 3] == 0 and cells[1, 1, 3] == 1, "the grey is seen there"
    assert heat_map(monkeypatch, ["0"], {"a": [0.1], "b": [0.2]}).axes[0].get_xlabel() == "iteration"


@pytest.mark.parametrize(
    ("method", "length", "told"),
    [("pca", 0.2, "reward model"), ("pca", 0.07, "reward model, 10 times as large"), ("tsne", 0.07, "reward model"),
     ("pca", 0.004, "reward model, 100 times as large"), ("pca", 0.0, "reward model")],
)  # fmt: skip
def test_a_side_too_small_to_see_is_drawn_larger(method: str, length: float, told: str) -> None:
    def side(length: float) -> dict[str, Any]:
        points = {"points": {"2d": [[1.0, 1.0], [1.0 + length, 1.0]]}, "predicted": {"2d": [[1.0 + 2 * length, 1.0]]}}
        return {"main": [0, 1], **points}

    data = {"policy": side(1.0), "reward": side(length), "explained_variance": [0.9, 0.1]}
    figure = drawn((5.2, 4.2), lambda figure: static._trajectory(figure, data, method, 2, "product"))
    shown = {str(line.get_label()): np.ptp(line.get_xdata()) for line in figure.axes[0].lines if len(line.get_xdata())}
    times = int(told.split()[2]) if "," in told else 1
    assert shown["policy"] == pytest.approx(1.0) and shown[told] == pytest.approx(times * length)


def test_figures_of_an_earlier_analysis_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an analysis alone: the run's curves and the user's files stay."""
    stale = ["trajectory-umap-2d-product.png", "angle-between-updates-degrees-by-layer-factors.svg"]
    kept = ["loss-while-training-the-policy.png", "mine.svg", "trajectory-umap-2d-product.txt"]
    for name in (*stale, *kept):
        (tmp_path / name).touch()
    figure = ("angle-between-updates-degrees", (1.0, 1.0), lambda figure: None)
    monkeypatch.setattr(static, "figures", lambda run, numbers: [figure])
    static.write_figures(tmp_path, tmp_path, None)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, *(f"{figure[0]}.{end}" for end in ("png", "svg"))}
