"""Every number that is shown in two places is one number: terminal, metrics.jsonl, summary.json and report.html."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zopro.store import shown
from zopro.system import progress
from zopro.train.callbacks import MetricsCallback


def test_the_bar_names_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[dict[str, str]] = []
    steps = SimpleNamespace(step=lambda done, numbers: beside.append(numbers))
    monkeypatch.setattr(progress, "begin", lambda *named, **options: steps)
    callback = MetricsCallback(lambda line: None, "policy", 0)
    state: Any = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    logs = {"reward": 1.5, "kl": 0.25, "completions/mean_length": 16.0, "loss": 0.5, "other": 1.0}
    callback.on_log(None, state, None, logs=logs)
    assert beside == [{"train reward": shown.reward(1.5), "KL an answer": shown.kl(4.0)}]
