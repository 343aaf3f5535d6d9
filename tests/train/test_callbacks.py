"""Every number that is shown in two places is one number: terminal, metrics.jsonl, summary.json and report.html."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from zopro.train import callbacks
from zopro.train.callbacks import MetricsCallback


def test_the_bar_names_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[dict[str, float]] = []
    bar = SimpleNamespace(step=lambda done, numbers: beside.append(numbers))
    monkeypatch.setattr(callbacks, "Progress", lambda *named: bar)
    callback = MetricsCallback(lambda line: None, "policy", 0)
    state: Any = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"reward": 1.5, "kl": 0.25, "loss": 0.5, "other": 1.0})
    assert beside == [{"loss": 0.5, "train_reward": 1.5, "kl_per_token": 0.25}]
