"""Import paths that documentation or run directories of earlier versions name keep working."""

from __future__ import annotations

import importlib

import pytest

PATHS = (
    "zopro.zo:SPSA",
    "zopro.zo:Ranks",
    "zopro.zo:Signs",
    "zopro.zo.directions:tensor_generator",
    "zopro.zo.guided:ResidualFeedback",
    "zopro.engine.feedback:Feedback",
    "zopro.objectives:rloo_advantages",
    "zopro.objectives:clipped_surrogate",
    "zopro.launch:Job",
    "zopro.launch:alone",
    "zopro.config:RunConfig",
    "zopro.errors:InputError",
    "zopro.tasks.base:make_example",
    "zopro.judges:judge_pairs",
    "zopro.rewards:RewardModel",
    "zopro.rewards:interpolate",
    "zopro.cli:main",
    "zopro.demo.task:judge",
    "zopro.reference:direction",
)


@pytest.mark.parametrize("path", PATHS)
def test_old_paths_lead_to_the_thing_itself(path: str) -> None:
    module, _, name = path.partition(":")
    thing = getattr(importlib.import_module(module), name)
    assert getattr(importlib.import_module(thing.__module__), thing.__name__) is thing
