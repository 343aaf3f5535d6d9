"""Defaults that depend on the task or the engine; all others stand beside their keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

BY_TASK: dict[str, dict[str, Any]] = {
    "verifiable": {
        "reward": ["maths"],
        "sft_steps": 0,  # rows need no answer to learn from
        "warm_start": "spsa",
        "max_prompt_length": 512,
        "max_completion_length": 256,  # room to reason
        "num_generations": 8,  # of two answers to a hard problem mostly both are wrong
        "iteration_share": 0.25,  # four iterations are one pass over the rows
        "eval_samples": 4,
        "eval_greedy": True,
    }
}


BY_ENGINE: dict[str, dict[str, Any]] = {
    name: {"sft_steps": 0, "warm_start": "spsa"} for name in ("llamacpp", "vllm")
}  # no gradients


def own_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those that what is given decides."""
    engine = str(given.get("engine", "")).partition(":")[0]
    return {**BY_TASK.get(given.get("task", ""), {}), **BY_ENGINE.get(engine, {})}


def default_of(key: dataclasses.Field[Any], task: str = "", engine: str = "") -> Any:
    """What a key is where nothing is said of it."""
    own = own_defaults({"task": task, "engine": engine})
    if key.name in own:
        return own[key.name]
    return key.default if key.default_factory is dataclasses.MISSING else key.default_factory()
