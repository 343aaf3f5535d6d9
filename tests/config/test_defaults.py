"""What a key is where nothing is said of it: by task, by engine; and what a method does not take from a configuration."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from zopro.analysis.page.report import _config_groups
from zopro.choices import METHODS, PUBLISHED
from zopro.config import RunConfig
from zopro.config.heeded import GROUPS
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


OF_PAPER = {"anchor": 0.1, "greedy": True, "population": 8, "antithetic": False}
OF_STEP = {"learning_rate": 0.5, "queries": 7, "sides": 1}


@pytest.mark.parametrize(
    ("method", "given", "named"),
    [
        ("es-paper", OF_PAPER, ["greedy", "anchor"]),
        ("es", OF_PAPER, []),
        ("es", {**OF_STEP, "beta": 0.0, "num_generations": 4, "parallel": "queries"}, ["num_generations", *OF_STEP]),
        (
            "es",
            {"beta": 0.1, "guide": "spsa", "first_order_learning_rate": 1.0},
            ["beta", "first_order_learning_rate", "guide"],
        ),
        ("fzoo", {"noise": "gaussian", "evaluation": "together"}, ["noise", "evaluation"]),
        ("fzoo", {"noise": "gaussian", "evaluation": "batched"}, ["noise"]),
        ("zopro", {**OF_STEP, "decay": "exponential", "first_order_learning_rate": 1.0}, []),
        ("zopro", {"es_learning_rate": 1.0, "sigma": 0.2}, ["es_learning_rate", "sigma"]),
        ("zopro", {"es_learning_rate": 1.0, "sigma": 0.2, "warm_start": "es"}, []),
        ("mezo", {"decay": "exponential", "warm_start": "spsa"}, ["decay"]),
        ("rloo", {**OF_STEP, "advantage": "grpo"}, [*OF_STEP]),
        ("online-dpo", {"advantage": "grpo"}, ["advantage"]),
        ("guided", {**OF_STEP, "guide": "mixed"}, ["learning_rate"]),
        ("guided", {**OF_STEP, "guide_tail": 8}, [*OF_STEP]),
        ("python:zopro.train.methods:mezo", {"sigma": 0.2, "guide_tail": 8}, []),
    ],
)
def test_only_what_was_set_is_named(method: str, given: dict[str, Any], named: list[str]) -> None:
    assert RunConfig.from_dict({**NEEDED, **given, "method": method}).unheeded() == named


def test_what_every_method_heeds_is_known() -> None:
    assert all({*(METHODS[name].heeds or ())} <= {*GROUPS} and METHODS[name].heeds is not None for name in METHODS)


def test_a_judge_that_nobody_asks_is_named() -> None:
    asked = {**NEEDED, "judge": "python:no_such_module:f", "uncertain_share": 0.5, "refine_steps": 3}
    assert RunConfig.from_dict(asked).unused() == ["refine_steps", "uncertain_share", "judge"]
    assert RunConfig.from_dict({**asked, "reward": "model"}).unused() == RunConfig.from_dict(NEEDED).unused() == []
