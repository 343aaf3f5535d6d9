"""No batch of answers has more rows than the configuration says, and one prompt's answers come one after the other."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zopro.loop import answers


@pytest.mark.parametrize(
    ("size", "count", "batches"),
    [
        (4, 1, [("abc", 1, 7)]),
        (4, 2, [("ab", 2, 7), ("c", 2, 8)]),
        (2, 2, [("a", 2, 7), ("b", 2, 8), ("c", 2, 9)]),
        (2, 3, [("a", 2, 7), ("a", 1, 8), ("b", 2, 9), ("b", 1, 10), ("c", 2, 11), ("c", 1, 12)]),
    ],
)
def test_batches(size: int, count: int, batches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "sample", lambda run, models, model, items, seed, part, greedy: (items, part, seed))
    run: Any = SimpleNamespace(config=SimpleNamespace(eval_batch_size=size))
    nothing: Any = None
    assert list(answers.sample_all(run, nothing, nothing, "abc", 7, count)) == batches  # type: ignore[arg-type]
