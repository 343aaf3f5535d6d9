"""A page from a template: one file that opens from the disk without a network.

Everything that came out of a model or a data set is escaped by the templates.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from zopro.analysis.page.charts import Chart
from zopro.store import shown
from zopro.store.durable import write_bytes


def render(template: str, *folders: Path, **values: Any) -> str:
    """The page of a template beside this file, or in one of the folders."""
    from zopro.analysis.page.drawing import SCHEMES

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(shown=shown, schemes=SCHEMES)
    return environment.get_template(template).render(**values)


def curves(charts: Sequence[Chart]) -> dict[str, Any]:
    """What a template draws of charts: those that show something, and the titles of those that stay at zero."""
    return {
        "charts": drawn(chart for chart in charts if not chart.flat),
        "flat": [chart.title for chart in charts if chart.shown and chart.flat],
    }


def drawn(charts: Iterable[Chart]) -> list[tuple[Chart, Markup]]:
    """Charts beside their `<svg>` elements; those without a point are left out."""
    from zopro.analysis.page.drawing import inline

    return [(chart, svg) for chart in charts if (svg := inline(chart))]


def replace_file(target: Path, content: bytes) -> Path:
    """Write a file in one step, so that a reader never sees half of it, beside another process that may do so too."""
    write_bytes(target, content, partial_of(target, os.getpid()))
    return target


def partial_of(target: Path, pid: int) -> Path:
    """Where a process has a file until it is whole."""
    return target.with_name(f"{target.name}.{pid}.partial")


def encoded(text: str) -> bytes:
    """Data may hold lone surrogates, which UTF-8 cannot: they become question marks."""
    return text.encode("utf-8", "replace")
