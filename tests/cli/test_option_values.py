"""Options that only a model, a library or the machine can judge: one line, and nothing is written."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import yaml

from commands import refused, refused_at_once
from tiny import tiny_model, tiny_tokenizer
from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.config.reading import FIELDS
from zopro.engine.local.targets import check_targets
from zopro.errors import InputError
from zopro.loop.own import check_own

pytestmark = pytest.mark.usefixtures("quietly")

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a module that is not there": (
        {"lora_target_modules": "q_proj,nope"},
        "'nope' fits none of the model's. There are",
    ),
    "norms": ({"lora_target_modules": "q_proj,input_layernorm"}, "Target module LlamaRMSNorm"),
    "a block": ({"lora_target_modules": "mlp"}, "Target module LlamaMLP"),
    "no module": ({"lora_target_modules": ","}, "must be all-linear, names"),
    "a report to nobody": ({"report_to": "wadnb"}, "report_to: must be of .*Did you mean 'wandb'"),
    "an accelerator that is not here": ({"device": "meta"}, "device: must be auto, cpu, cuda or mps, got 'meta'"),
    "a precision of none": ({"dtype": "float8"}, "dtype: must be one of auto, float32, bfloat16, float16, got 'float8'"),
    "a judge that is no model": ({"judge": "model:no/such/folder"}, "judge: no folder and no Hub id"),
    "a judge that is nowhere": ({"judge": "model:nobody/nothing"}, "judge: "),
    "a method that is none": ({"method": "python:math:pi"}, "method: must be a zopro.choices.Method or a function"),
    "a method that makes nothing": (
        {"method": "python:math:sqrt"},
        "method: must return a trainer of transformers, got 'python:math:sqrt', which raised TypeError: must be real",
    ),
    "an engine that is none": (
        {"engine": "python:math:sqrt", "method": "es", "reward": "length:1-8", "sft_steps": 0},
        "engine: must be a function from the options to a model, got 'python:math:sqrt', which raised TypeError: must be",
    ),
    "a task that is none": ({"task": "python:builtins:repr"}, "task: must be a function .* which made str"),
    "a task that fails": ({"task": "python:math:sqrt"}, "task: must be a function .* which raised TypeError"),
    "noise of no module": ({"noise": "python:no_such_module:Sparse"}, "noise: cannot import 'no_such_module'"),
    "a module that ends the process": ({"noise": "python:ends:N"}, r"noise: cannot import 'ends' \(SystemExit: 0\)"),
    "a file for a module": ({"noise": "python:mine.py:N"}, r"noise: cannot import 'mine.py' .*Give mine:N\."),
    "noise that takes arguments": ({"noise": "python:math:sqrt"}, "noise: must be a class of zopro.zo.Directions"),
    "noise that raises": (
        {"noise": "python:hostile_noise:Raises"},
        "noise: .*'python:hostile_noise:Raises'.* which raised RuntimeError: no luck",
    ),
    "noise that is none": ({"noise": "python:builtins:dict"}, "noise: must be a class .* which made dict"),
}
TARGETS = {
    "q_proj|v_proj": "must match whole names such as",
    "(": "it is no regular expression",
    "q_proj,lm_head": "the output head cannot carry one",
    "score": "'score' fits none of the model's",  # the reward model's head
    "all-linear,lm_head": "'all-linear' fits none",
}
NOISE = {
    "Nothing": "which made NoneType",
    "Double": "is of torch.float64 and shape .*, must be of float32",
    "Flat": r"shape \(128,\)",
    "Infinite": "entries that are not finite",
    "Kept": "the same tensor at each call",
    "Free": "differs between two calls",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_does_not_fit(name, inputs, tmp_path, capsys):
    options, words = OPTIONS[name]
    assert re.search(words, refused_at_once(capsys, inputs, tmp_path, **options))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama", tiny_tokenizer(), num_hidden_layers=1)


def options(**given: str) -> RunConfig:
    return RunConfig(model="m", task="chat", train_data="x", **given)


@pytest.mark.parametrize("targets", TARGETS)
def test_modules_that_an_adapter_cannot_be_put_on(targets, model):
    with pytest.raises(InputError, match=f"^lora_target_modules: must .*{TARGETS[targets]}"):
        check_targets(model, options(lora_target_modules=targets))


@pytest.mark.parametrize("name", NOISE)
def test_noise_that_no_step_can_be_made_of(name):
    noise = f"python:hostile_noise:{name}"
    with pytest.raises(InputError, match=f"^noise: .*'{noise}'.* {NOISE[name]}"):
        check_own(options(noise=noise), ("w", torch.zeros(4, 32)))


def test_a_report_to_what_is_not_installed(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zopro.train.callbacks.get_available_reporting_integrations", list)
    line = refused_at_once(capsys, inputs, tmp_path, report_to="tensorboard")
    assert line == "report_to: tensorboard must be installed, and is not. Install it, or leave it out."


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.type in ("int", "float")])
def test_numbers_that_nothing_can_hold(key, inputs, tmp_path, capsys):
    data = {"model": str(inputs / "model"), "task": "preference", "train_data": str(inputs / "rows.jsonl")}
    for value in (-1, 10**20 if FIELDS[key].type == "int" else 1e300):
        settings = {**data, "judge": "python:tiny_runs:prefers_short", "output_dir": str(tmp_path / "run"), key: value}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        assert refused(capsys, "run", tmp_path / "config.yaml").startswith(f"{key}: must ")
        assert not (tmp_path / "run").exists()


def test_a_run_that_can_be_written_nowhere(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("file", "file/run", "loop/run", "long" * 100):
        line = refused_at_once(capsys, inputs, tmp_path, output_dir=str(tmp_path / place))
        assert line.startswith("output_dir: must be a folder that can be written to, got "), line
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may write everywhere
    assert refused_at_once(capsys, inputs, tmp_path).startswith("output_dir: must be a folder that can be written to")


def test_every_method_has_a_learning_rate():
    assert {method.rate for method in METHODS.values()} <= set(FIELDS)
