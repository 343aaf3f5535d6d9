"""Plots of a comparison, for a paper: reward against seconds, reward against KL, and memory. PNG and PDF."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zopro.analysis.page.charts import DASHED
from zopro.analysis.page.drawing import COLOURS, DASHES, method_style
from zopro.store import shown
from zopro.store.shown import PER_ANSWER

STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # fonts as text, which journals ask for
}
SIZE = (4.2, 3.0)  # inches: one column of two
MARKERS = "osD^vPX*"  # of another number than the colours, so that methods which share one differ in the other


def write_plots(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write reward_seconds, reward_kl and memory to `folder` and return the paths."""
    import matplotlib

    start = shown.start(result.get("sft_steps"))
    with matplotlib.rc_context(STYLE):
        return [
            *_write(folder / "reward_seconds", lambda axes: _curves(axes, result, "seconds", "training time (s)")),
            *_write(
                folder / "reward_kl",
                lambda axes: _curves(axes, result, PER_ANSWER, f"KL to {start.the} (nats per answer)"),
            ),
            *_write(folder / "memory", lambda axes: _memory(axes, result)),
        ]


def _write(stem: Path, draw: Callable[[Any], None]) -> list[Path]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for path in paths:
        figure.savefig(path, dpi=200)
    return paths


def _curves(axes: Any, result: Mapping[str, Any], key: str, label: str) -> None:
    for index, (name, method) in enumerate(result["methods"].items()):
        curve = method["curve"]
        x = [point[key] for point in curve]
        low, high = ([_number(point[f"reward_{side}"]) for point in curve] for side in ("low", "high"))
        colour, *more = method_style(index).split()  # as on the page
        dashes, marker = DASHES if DASHED in more else "-", MARKERS[index % len(MARKERS)]
        drawn: Any = {"color": COLOURS[colour], "linestyle": dashes, "marker": marker}
        axes.plot(x, [point["reward"] for point in curve], **drawn, label=name)
        if key == "seconds":
            axes.fill_between(x, low, high, color=COLOURS[colour], alpha=0.12, linewidth=0)
    axes.locator_params(axis="x", nbins=5)  # numbers as long as 0.0175 do not touch
    axes.set_xlabel(label)
    axes.set_ylabel("reward on held-out prompts")
    axes.legend()


def _number(bound: float | None) -> float:
    """As matplotlib leaves it out."""
    return math.nan if bound is None else bound


def _memory(axes: Any, result: Mapping[str, Any]) -> None:
    names = list(result["methods"])
    peaks = [result["methods"][name]["peak_mb"] for name in names]
    colours = [COLOURS[method_style(index).split()[0]] for index in range(len(names))]
    bars = axes.barh(names, peaks, color=colours, height=0.6)
    axes.bar_label(bars, [f"{peak:,.0f}" for peak in peaks], padding=3, fontsize=8)
    axes.axvline(result["inference_peak_mb"], color="#444444", linestyle="--", linewidth=1, label="sampling alone")
    axes.set_xlim(0, 1.2 * max(*peaks, result["inference_peak_mb"]))
    axes.set_xlabel("peak memory of training (MB)")
    axes.grid(visible=False, axis="y")
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.15))
