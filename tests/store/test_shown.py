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


def test_one_thing_is_no_several() -> None:
    record = {"known_before": 1, "forgotten": 0, "of": 5, "answers": []}
    assert shown.remembered(record) == "forgotten: none of the 1 easy question it knew"
    line = {"other_n": 1, shown.ELSEWHERE: 1.0}
    assert shown.elsewhere(line).startswith("on 1 prompt of another task: KL 1.00")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("data/private/rows.jsonl", "rows.jsonl"),
        ("data/rows.csv", "rows.csv"),
        ("../mine/rows", "rows"),
        ("./rows", "rows"),
        ("model:../judges/mine", "model:mine"),
        ("me/rows", "me/rows"),
        ("openai:accounts/them/models/large", "openai:accounts/them/models/large"),
        ("python:my_judges:shorter", "python:my_judges:shorter"),
        ("", ""),
    ],
)
def test_a_path_is_known_where_it_is_not_there_too(name: str, text: str) -> None:
    assert shown.place(name) == text
