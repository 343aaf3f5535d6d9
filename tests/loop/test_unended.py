"""Answers that do not end are told of once, with their number."""

from __future__ import annotations

from typing import Any

from zopro.loop.unended import ENOUGH, UnendedCallback


def told(*shares: float | None, answers: int = 8) -> list[str]:
    lines: list[str] = []
    callback: Any = UnendedCallback(lines.append, "policy 0", answers, 48)
    for share in shares:
        callback.on_log(None, None, None, {"completions/clipped_ratio": share} if share is not None else {"loss": 1.0})
    callback.on_train_end(None, None, None)
    return lines


def test_more_than_a_tenth_is_told_once() -> None:
    few = "policy 0: 8 of 16 sampled answers (50 %) do not end within max_completion_length: 48."
    assert [line.startswith(few) for line in told(0.25, None, 0.75)] == [True]
    (line,) = told(*[0.25] * 20)
    assert line.startswith(f"policy 0: {ENOUGH // 4} of {ENOUGH} sampled answers (25 %)")
    assert told(0.1, 0.1) == told() == told(float("nan")) == []
