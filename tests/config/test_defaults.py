"""What a key is where nothing is said of it: by task, by engine; and what a method does not take from a configuration."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from zopro.analysis.page.report import _config_groups
from zopro.choices import METHODS, PUBLISHED
from zopro.config import RunConfig
from zopro.loop.card import _settings

NEEDED: dict[str, Any] = {"model": "m", "task": "chat", "train_data": "x", "reward": ["chrf"], "method": "es"}


@pytest.mark.parametrize("engine", ["transformers", "vllm:http://host:8000", "llamacpp:model.gguf"])
def test_what_an_engine_or_a_task_decides_is_no_choice_of_the_run(engine: str) -> None:
    config = RunConfig.from_dict({**NEEDED, "engine": engine})
    changed = {row["name"] for _, rows in _config_groups(config.to_dict()) for row in rows if row["changed"]}
    decided = {"sft_steps", "warm_start"}
    assert not changed & decided and not any(f"\n{name}:" in _settings(config) for name in decided)
    assert "\nwarm_start: es" in _settings(dataclasses.replace(config, warm_start="es"))


def test_what_a_method_has_of_its_own_is_known_to_the_configuration() -> None:
    from zopro.train.methods import evolution_paper

    keys = {key.name for key in dataclasses.fields(RunConfig)}
    assert all({entry.partition("=")[0] for entry in METHODS[name].fixed} <= keys for name in METHODS)
    said = inspect.getsource(evolution_paper)
    assert all(f"{name}=" in said for name in PUBLISHED)


def test_only_what_was_set_is_named() -> None:
    config = RunConfig.from_dict({**NEEDED, "method": "es-paper", "anchor": 0.1, "greedy": True, "population": 8})
    assert config.unheeded_by("es-paper") == ["greedy", "anchor"] and config.unheeded_by("es") == []
    for evaluation, named in (("together", ["noise", "evaluation"]), ("batched", ["noise"]), ("sequential", ["noise"])):
        config = RunConfig.from_dict({**NEEDED, "noise": "gaussian", "evaluation": evaluation})
        assert config.unheeded_by("fzoo") == named


def test_a_judge_that_nobody_asks_is_named() -> None:
    asked = {**NEEDED, "judge": "python:no_such_module:f", "uncertain_share": 0.5, "refine_steps": 3}
    assert RunConfig.from_dict(asked).unused() == ["refine_steps", "uncertain_share", "judge"]
    assert RunConfig.from_dict({**asked, "reward": "model"}).unused() == RunConfig.from_dict(NEEDED).unused() == []
