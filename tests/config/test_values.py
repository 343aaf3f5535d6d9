"""What Python gives a `RunConfig` is read as from a file: words of a number are a number, and nonsense is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zopro.config import RunConfig
from zopro.config.reading import FIELDS
from zopro.errors import InputError


def config(**given: Any) -> RunConfig:
    return RunConfig(**{"model": "m", "task": "verifiable", "train_data": "x", **given})


@pytest.mark.parametrize(
    ("key", "given", "read"),
    [
        ("lora_freeze_a", "false", False),
        ("lora_freeze_a", "True", True),
        ("policy_steps", "5", 5),
        ("policy_steps", 5.0, 5),
        ("seed", np.int64(3), 3),
        ("learning_rate", "2e-4", 2e-4),
        ("learning_rate", np.float32(0.5), 0.5),
        ("eps", "0.1", 0.1),
        ("output_dir", Path("runs/x"), "runs/x"),
        ("reward", ("exact", "length:1-8"), ["exact", "length:1-8"]),
        ("reward_weights", (1, "0.5"), [1.0, 0.5]),
        ("easy_questions", 1, 1),
        ("easy_questions", "1", 1),
        ("easy_questions", "yes", True),
        ("easy_questions", 5, True),
        ("easy_questions", "0", False),
        ("policy_steps", None, FIELDS["policy_steps"].default),
        ("sft_steps", None, 0),  # of the task
    ],
)
def test_it_is_what_it_says(key: str, given: Any, read: Any) -> None:
    more = {"reward": ["exact", "json"]} if key == "reward_weights" else {}
    found = getattr(config(**{key: given}, **more), key)
    assert found == read and type(found) is type(read)


@pytest.mark.parametrize(
    ("key", "given", "rule"),
    [
        ("lora_freeze_a", "maybe", "true or false"),
        ("lora_freeze_a", 0.5, "true or false"),
        ("policy_steps", "many", "a whole number"),
        ("policy_steps", 2.5, "a whole number"),
        ("policy_steps", True, "a whole number"),
        ("learning_rate", "high", "a finite number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", [1e-4], "a finite number"),
        ("model", {"name": "m"}, "a text"),
        ("model", object, "a text"),
        ("reward_weights", ["one"], "a list of finite numbers, comma separated"),
    ],
)
def test_what_cannot_be_read_is_one_line(key: str, given: Any, rule: str) -> None:
    with pytest.raises(InputError) as caught:
        config(**{key: given})
    assert str(caught.value) == f"{key}: must be {rule}, got {given!r}."


@pytest.mark.parametrize("key", ["engine_timeout", "judge_timeout", "judge_request_timeout", "reward_timeout"])
def test_for_ever_is_longer_than_can_be_waited(key: str) -> None:
    assert getattr(config(**{key: 1e9}), key) == 1e9
    with pytest.raises(InputError, match=rf"^{key}: must be at most 1e\+09, got 10000000000"):
        config(**{key: 1e10})
    with pytest.raises(InputError, match=r"^judge_max_retries: must be at most 1000, got 1001"):
        config(judge_max_retries=1001)


@pytest.mark.parametrize("key", ["eps", "sigma", "weight_decay"])
def test_what_breaks_any_model_is_not_laid_to_the_learning_rate(key: str) -> None:
    with pytest.raises(InputError, match=rf"^{key}: must be at most 1e\+06, got '?1e\+30"):
        config(**{key: 1e30})


@pytest.mark.parametrize("key", ["output_dir", "model", "train_data", "eval_data", "other_data", "adapter_folder"])
def test_a_path_begins_at_home(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/at/home")
    assert getattr(config(**{key: "~/x"}), key) == "/at/home/x" == getattr(config(**{key: Path("~/x")}), key)
    assert getattr(config(**{key: "a~/x"}), key) == "a~/x"
    assert config(vllm_python="~/env/bin/python").vllm_python == "/at/home/env/bin/python"


def test_so_does_one_inside_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/at/home")
    found = config(reward=["model:~/x", "regex:~/x", "exact"], judge="model:~/y", engine="llamacpp:~/z.gguf")
    assert found.reward == ["model:/at/home/x", "regex:~/x", "exact"], "a pattern is none"
    assert (found.judge, found.engine) == ("model:/at/home/y", "llamacpp:/at/home/z.gguf")
    assert found.to_dict()["reward"] == found.reward and config(judge="openai:~y").judge == "openai:~y"


def test_reading_what_was_read_changes_nothing() -> None:
    given = config(reward=["exact", "regex:a, b"], eps=1e-05, report_to="none", easy_questions="7", sigma="auto")
    assert given.easy_questions == 7 and RunConfig(**given.to_dict()) == given
