"""Model folders that cannot be loaded: one line, and nothing is written. A further kind is a further row of `MODELS`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from commands import refused_at_once

pytestmark = pytest.mark.usefixtures("quietly")

Change = Callable[[Path], object]


def of(name: str, **values: Any) -> Change:
    """Change keys of a JSON file in the model's folder; `...` deletes one."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text()) | values
        (folder / name).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def without(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def holding(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def quantised(method: str, **values: Any) -> Change:
    return of("config.json", quantization_config={"quant_method": method, **values})


LOAD = "model: cannot load the "


MODELS: dict[str, tuple[Change, str]] = {
    "no config": (without("config.json"), LOAD),
    "config is no JSON": (holding("config.json", b"{"), LOAD),
    "config is a list": (holding("config.json", b"[]"), LOAD),
    "no model type": (of("config.json", model_type=...), LOAD),
    "unknown model type": (of("config.json", model_type="nope"), LOAD),
    "encoder-decoder": (of("config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]), LOAD),
    "no language model": (of("config.json", model_type="clip"), LOAD),
    "encoder": (of("config.json", model_type="bert"), "model: the files of "),
    "a wrong type": (of("config.json", hidden_size="big"), LOAD),
    "a negative size": (of("config.json", num_attention_heads=-1), LOAD),
    "another width": (of("config.json", hidden_size=64), "its weights do not have the shapes"),
    "a layer too many": (of("config.json", num_hidden_layers=3), "lack 'model.layers.1"),
    "unknown activation": (of("config.json", hidden_act="nope"), "KeyError: 'nope'"),
    "unknown RoPE": (of("config.json", rope_scaling={"type": "nope"}), LOAD),
    "unknown dtype": (of("config.json", dtype="nope"), LOAD),
    "stop is no id": (
        holding("generation_config.json", b'{"eos_token_id": "x"}'),
        "eos_token_id in its",
    ),
    "no weights": (without("model.safetensors"), LOAD),
    "a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), LOAD),
    "weights of noise": (holding("model.safetensors", bytes(200)), LOAD),
    "empty weights": (holding("model.safetensors", b""), LOAD),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "must hold tokenizer.json"),
    "tokenizer is no JSON": (holding("tokenizer.json", b"{"), LOAD + "tokenizer"),
    "tokenizer of another making": (holding("tokenizer.json", b'{"a": 1}'), LOAD + "tokenizer"),
    "tokenizer's configuration is no JSON": (holding("tokenizer_config.json", b"{"), LOAD + "tokenizer"),
    "template is no text": (holding("chat_template.jinja", b"\xff\xfe"), LOAD + "tokenizer"),
    "template is no template": (holding("chat_template.jinja", b"{% for %}"), "chat template"),
    "template of nothing": (holding("chat_template.jinja", b""), "renders the text of a message as nothing"),
    "GPTQ": (quantised("gptq", bits=4, group_size=32), LOAD + "model"),
    "AWQ": (quantised("awq", bits=4, group_size=32, version="gemm", zero_point=True), LOAD + "model"),
    "bitsandbytes 4 bits": (quantised("bitsandbytes", load_in_4bit=True), "bitsandbytes"),
    "bitsandbytes 8 bits": (quantised("bitsandbytes", load_in_8bit=True), "bitsandbytes"),
    "compressed-tensors": (quantised("compressed-tensors", config_groups={}), LOAD + "model"),
    "torchao": (quantised("torchao", quant_type={"default": {"_type": "X", "_data": {}}}), LOAD + "model"),
    "HQQ": (quantised("hqq", quant_config={}), LOAD + "model"),
    "quantised by nobody": (of("config.json", quantization_config={"bits": 4}), "quant_method"),
    "a run": (lambda f: [(f / "policy").mkdir(), (f / "config.yaml").touch()], "Use zopro export"),
    "a model and an adapter": (holding("adapter_config.json", b"{}"), "which is both"),
    "a broken adapter": (
        lambda f: [path.unlink() for path in f.iterdir()] and (f / "adapter_config.json").write_text("{"),
        "must be a PEFT adapter's configuration",
    ),
    "an adapter of nothing": (
        lambda f: [p.unlink() for p in f.iterdir()] and (f / "adapter_config.json").write_text('{"peft_type": "LORA"}'),
        "set base_model_name_or_path",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_folder_that_is_none(name, inputs, tmp_path, capsys):
    change, words = MODELS[name]
    if "bitsandbytes" in name and find_spec("bitsandbytes"):
        pytest.skip("it is installed")
    shutil.copytree(inputs / "model", tmp_path / "model")
    change(tmp_path / "model")
    line = refused_at_once(capsys, inputs, tmp_path, model=str(tmp_path / "model"))
    assert words in line and line.startswith(("model: ", "train_data: "))


HUB = {
    "gated": "You are trying to access a gated repo.\nMake sure to have access to it.\n401 Client Error.",
    "the Hub cannot be reached": "We couldn't connect to 'https://hub' to load the files, and couldn't find them cached.",
    "no Hub id of that name": "a/b is not a local folder and is not a valid model identifier listed on 'https://hub'",
}


@pytest.mark.parametrize("words", HUB)
def test_what_the_hub_says(words, inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise OSError(HUB[words])

    monkeypatch.setattr("zopro.engine.local.starts.find_adapter_config_file", lambda model: None)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fails)
    assert words in refused_at_once(capsys, inputs, tmp_path, model="a/b")
