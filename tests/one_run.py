"""A run whose numbers are looked at: what it recorded, and the words of its report."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

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


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def page(run: Path) -> str:
    """The words of the report, with one blank between them."""
    html = (run / "report.html").read_text("utf-8")
    html = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))
