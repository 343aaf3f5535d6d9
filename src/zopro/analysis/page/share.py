"""A run in one picture, for a message or a model card: verdict, reward, and one prompt answered before and after.

1200 x 630 pixels, what previews of links take. Drawn by matplotlib like the figures.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zopro.analysis.page.answers import Answer, samples
from zopro.analysis.page.charts import Chart
from zopro.analysis.page.curves import evaluation_charts, training_charts
from zopro.analysis.page.drawing import COLOURS, clean, draw, style
from zopro.analysis.page.pages import replace_file
from zopro.analysis.page.verdict import verdict
from zopro.analysis.reading.records import latest_evaluations, read_config, read_metrics, start_of
from zopro.store import shown
from zopro.store.layout import Layout

SIZE, DOTS = (12.0, 6.3), 100  # inches, and pixels each
INK, PAPER = "#1c2128", "#ffffff"
LINES, LETTERS = 4, 52  # of each text on the right


def write_share(run: Path, target: Path | None = None) -> Path | None:
    """Write `run`/share.png (or `target`) and return its path; None of a run without a policy that was evaluated."""
    config, metrics = read_config(run), read_metrics(run)
    evaluations, start = latest_evaluations(metrics), start_of(config)
    found = verdict(run, config, evaluations)
    if found is None:
        return None
    newest = shown.policy(evaluations[-1]["iteration"], start)
    charts = [*training_charts(metrics, start)[:1], *evaluation_charts(evaluations, start)[:1]]
    about = [str(config.get(key) or "") for key in ("method", "task")] + [shown.place(str(config.get("model", "")))]
    with style(**{"savefig.dpi": DOTS, "font.size": 13}):
        figure = Figure(figsize=SIZE, dpi=DOTS, facecolor=PAPER)
        FigureCanvasAgg(figure)
        _text(figure, 0.04, 0.93, f"zopro · {' · '.join(filter(None, about))}", COLOURS["muted"], 14)
        _text(figure, 0.04, 0.86, found.word, INK, 25, weight="bold")
        sentence = textwrap.fill(found.sentence, 112, max_lines=3, placeholder=" …")
        _text(figure, 0.04, 0.765, sentence, INK, 14)
        _curve(figure, next((chart for chart in charts if not chart.flat), None))
        for sample in samples(run)[:1]:
            _answers(
                figure, sample.title, [answer for name in (start.name, newest) for answer in sample.of(name).answers]
            )
        content = io.BytesIO()
        figure.savefig(content, format="png", metadata={"Software": None})
    return replace_file(target or Layout(run).share(), content.getvalue())


def _text(figure: Figure, x: float, y: float, words: str, colour: str, size: float, **more: Any) -> None:
    figure.text(x, y, clean(words), color=colour, fontsize=size, va="top", **more)


def _curve(figure: Figure, chart: Chart | None) -> None:
    if chart is None:
        return
    axes = draw(figure, chart)
    axes.set_position((0.075, 0.12, 0.40, 0.45))
    axes.set_title(chart.title, fontsize=14, loc="left", color=INK)
    if len(chart.shown) > 1:
        axes.legend(frameon=False, fontsize=11)


def _answers(figure: Figure, asked: str, answers: Sequence[Answer]) -> None:
    """The prompt, and the first answer of each policy under it."""
    y = 0.625
    first = {answer.name: answer for answer in reversed(answers)}  # sampled, before the greedy one
    blocks = [("", asked, COLOURS["muted"])]
    for name in dict.fromkeys(answer.name for answer in answers):
        answer = first[name]
        title = f"{name}, broken: {answer.broken}" if answer.broken else name
        blocks.append((title, answer.text, INK))
    for title, words, colour in blocks:
        if title:
            _text(figure, 0.53, y, textwrap.shorten(title, LETTERS, placeholder=" …"), COLOURS["c1"], 13, weight="bold")
            y -= 0.045
        lines = textwrap.wrap(" ".join(words.split()), LETTERS, max_lines=LINES, placeholder=" …") or ["-"]
        _text(figure, 0.53, y, "\n".join(lines), colour, 14, linespacing=1.25)
        y -= 0.046 * len(lines) + 0.025
