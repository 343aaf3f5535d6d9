"""benchmarks/loop.py: what runs of several methods share is copied, and their table says what their files say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts import benchmark
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.store.layout import Layout
from zopro.store.rundir import begun_with

CONFIG = RunConfig(model="m", task="chat", train_data="x", seed=0, iterations=1)


@pytest.fixture(scope="module")
def loop() -> Any:
    return benchmark("loop")


def run(folder: Path, rewards: dict[int | None, dict[str, float]]) -> Path:
    """A run's folder with the evaluations of its iterations: reward by prompt."""
    layout = Layout(folder)
    layout.evaluations().mkdir(parents=True)
    layout.config().write_text(yaml.safe_dump(CONFIG.to_dict()))
    layout.summary().write_text("{}")
    for iteration, found in rewards.items():
        lines = [json.dumps({"prompt": prompt, "reward": reward}) for prompt, reward in found.items()]
        layout.evaluation(iteration).write_text("\n".join(lines) + "\n")
        layout.evaluation(iteration, ".json").write_text(json.dumps({"kl_per_answer": 0.5, "win_rate": 0.75}))
    end = {"stage": "policy", "iteration": 1, "step": None, "event": "end", "seconds": 12.0, "peak_rss_mb": 1.0}
    layout.metrics().write_text(json.dumps(end) + "\n")
    return folder


def test_differences_are_paired_by_prompt_and_seed(loop: Any, tmp_path: Path) -> None:
    """Prompts may come in another order from seed to seed."""
    first = {None: {"a": 0.0, "b": 1.0}, 0: {"a": 1.0, "b": 2.0}}
    one = [
        run(tmp_path / "one0", {**first, 1: {"a": 3.0, "b": 9.0}}),
        run(tmp_path / "one1", {**first, 1: {"b": 7, "a": 1}}),
    ]
    two = [
        run(tmp_path / "two0", {**first, 1: {"b": 8.0, "a": 2.0}}),
        run(tmp_path / "two1", {**first, 1: {"a": 0, "b": 6}}),
    ]
    text = loop.table({"one": one, "two": two})
    assert "| start | SFT | 0.50" in text and "| start | 0 | 1.50" in text
    assert "| one | 1 | 5.00" in text and "| 6.00, 4.00 | 0.750 | 0.5, 0.5 |  | 12 |" in text
    assert "| one |  | +1.00 [1.00, 1.00] |" in text and "| two | -1.00 [-1.00, -1.00] |  |" in text


def test_methods_go_on_from_a_copy_of_the_start(loop: Any, tmp_path: Path) -> None:
    start = run(tmp_path / "start", {None: {"a": 0.0}, 0: {"a": 1.0}})
    whole = replace(CONFIG, iterations=3, output_dir=str(tmp_path / "zopro-paper"))
    own = loop.of_method(whole, "zopro-paper", 0.5)
    assert (own.method, own.preset, own.learning_rate, own.first_order_learning_rate) == (
        *("zopro-paper", "paper", 0.5),
        CONFIG.first_order_learning_rate,
    )
    assert loop.of_method(whole, "rloo", 0.5).first_order_learning_rate == 0.5
    loop.copied(start, own)
    there = Layout(own.output_dir)
    assert there.evaluation(0).read_text() == Layout(start).evaluation(0).read_text() and not there.summary().exists()
    assert begun_with(there.path, own) == own.to_dict()
    there.evaluation(1).write_text("kept")
    loop.copied(start, own)
    assert there.evaluation(1).read_text() == "kept"
    with pytest.raises(InputError, match=r"belongs to another config \(learning_rate is 0.5 there, 0.7 here"):
        loop.begun(replace(own, learning_rate=0.7))
