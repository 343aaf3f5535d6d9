"""A run whose numbers are looked at: what it recorded, and the words of its report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from zopro.analysis.numbers import projection
from zopro.analysis.page import static
from zopro.loop import pipeline

AGO, BEFORE = 100.0, {"pretraining": 60.0}


def no_figures(patch: pytest.MonkeyPatch) -> None:
    """Runs end with their report, without an analysis."""
    patch.setattr(pipeline.write, "refresh", lambda run: None)
    patch.setattr(pipeline.write, "finish", lambda run: None)


def no_report(patch: pytest.MonkeyPatch) -> None:
    """Runs end without a report, which takes longer than the smallest of them."""
    no_figures(patch)
    patch.setattr(pipeline.write, "page", lambda run, summary: None)


def no_embedding(patch: pytest.MonkeyPatch) -> None:
    """t-SNE and UMAP, of seconds each, leave every point where PCA has put it."""
    patch.setattr(projection, "_METHODS", dict.fromkeys(projection._METHODS, lambda distances, start, seed: start))


def few_figures(patch: pytest.MonkeyPatch, *drawn: str) -> list[str]:
    """Of an analysis, these are drawn; the names of all, once it is done."""
    names: list[str] = []
    figures = static.figures

    def few(run: Path, numbers: dict[str, Any] | None) -> Iterator[Any]:
        for name, size, draw in figures(run, numbers):
            names.append(name)
            if name in drawn:
                yield name, size, draw

    patch.setattr(static, "figures", few)
    return names


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def page(run: Path) -> str:
    """The words of the report, with one blank between them."""
    html = (run / "report.html").read_text("utf-8")
    html = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))
