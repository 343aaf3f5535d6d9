"""A configuration to begin with: a commented YAML file that runs as it is on a small instruct model and two cores."""

from __future__ import annotations

import dataclasses
import json
import shlex
import textwrap
from collections.abc import Iterator
from typing import Any

from zopro.config import RunConfig
from zopro.config.arguments import FIRST
from zopro.config.defaults import default_of

SMALL_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FAR = 10.0
"""Nats an answer: a policy that is further from its start than this rarely answers better."""

_SMALL: dict[str, Any] = {
    "iterations": 2,
    "policy_steps": 10,
    "prompts_per_step": 4,
    "num_generations": 4,
    "sft_steps": 0,
    "first_order_learning_rate": 2e-5,
    "max_kl": FAR,
    "reward_steps": 30,
    "eval_prompts": 8,
    "pair_prompts": 16,
}
"""What a first run on two cores has the time for. Its back-propagation is gentle: at the default rate, which a whole run
is made for, two steps can make a small model forget the capital of France. So can 20 steps of SFT on a few rows, which an
instruct model does not need (docs/lab/runs.md)."""

STARTING: dict[str, dict[str, Any]] = {
    "chat": _SMALL,
    "preference": _SMALL,
    "summarization": {**_SMALL, "max_prompt_length": 512, "max_completion_length": 64},
    "translation": _SMALL,
    "verifiable": {
        "reward": [
            "maths",
            r"regex:\d+ [-+*] \d+ = -?\d+",
        ],  # few answers are right at first, and most of those are equations
        "method": "es",
        "iterations": 1,
        "policy_steps": 30,
        "prompts_per_step": 4,
        "population": 32,
        "es_learning_rate": 0.006,
        "max_kl": FAR,
        "lora_freeze_a": True,
        "max_completion_length": 24,
        "temperature": 0.7,
        "eval_prompts": 64,
        "eval_samples": 2,
    },
}
"""What a task begins with, where that is not the default."""


def template(task: str, model: str, train_data: str, file: str) -> str:
    """The file's text: the keys that people change first and those that this task sets, each below what it means.

    >>> print(template("chat", "my-model", "rows.jsonl", "chat.yaml").splitlines()[0])
    # A first run: zopro run chat.yaml. Every key can also be given as --key value, which wins.
    """
    given = {"model": model or SMALL_MODEL, "task": task, "train_data": train_data} | STARTING.get(task, {})
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    keys = [*(key for key in FIRST if key in fields), *(key for key in given if key not in FIRST)]
    lines = [f"# A first run: zopro run {shlex.quote(file)}. Every key can also be given as --key value, which wins.", ""]
    for key in keys:
        lines += _described(fields[key], given, task)
    return "\n".join([*lines, "# All other keys, with their defaults: zopro run --help-all."]) + "\n"


def _described(field: dataclasses.Field[Any], given: dict[str, Any], task: str) -> Iterator[str]:
    yield from textwrap.wrap(field.metadata["help"], 116, initial_indent="# ", subsequent_indent="# ")
    key, value = field.name, given.get(field.name, default_of(field, task))
    yield f"{key}: {json.dumps(value, ensure_ascii=False)}" if key in given or value != "" else f"# {key}:"
    yield ""
