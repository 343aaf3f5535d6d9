"""Every number that is shown in two places is one number: terminal, metrics.jsonl, summary.json and report.html."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zopro.store import shown


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (shown.kl, -0.001, "0.00"),
        (shown.reward, 12345.6789, "12345.679"),
        (shown.seconds, 12345.67, "12345.7"),
        (shown.megabytes, 2458.51, "2459"),
        (shown.share, None, "-"),
        (shown.share, float("nan"), "-"),
    ],
)
def test_numbers_are_rounded_alike(show: Callable[[Any], str], value: Any, text: str) -> None:
    assert show(value) == text
