"""What libraries raise on a person's input reaches the person as one line: models, options, trainings, damaged runs.

A further kind of bad input is a further row of a table. Everything goes through the command, in this process.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_runs import config, fingerprint, write_inputs
from zopro import cli
from zopro.config import METHODS, RATE_KEYS
from zopro.config.reading import FIELDS
from zopro.errors import Diverged
from zopro.loop import pipeline
from zopro.store.explained import explained

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    monkeypatch.setattr(pipeline.write, "refresh", lambda run: None)
    monkeypatch.setattr(pipeline.write, "finish", lambda run: None)


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and last line of a command; an exception that it lets through fails the test as the traceback it is."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, (out if code == 0 else err).strip().splitlines()[-1] if out + err else ""


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, line = typed(capsys, *words)
    assert code == 2 and line.startswith("zopro: error: "), line
    return line.removeprefix("zopro: error: ")


def run(capsys: pytest.CaptureFixture[str], inputs: Path, folder: Path, *words: str, **options: Any) -> tuple[int, str]:
    settings = config(inputs, folder / "run", iterations=1, policy_steps=1).to_dict() | options
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return typed(capsys, "run", folder / "config.yaml", *words)


def refused_at_once(capsys: pytest.CaptureFixture[str], inputs: Path, folder: Path, **options: Any) -> str:
    """The line of a run that has written nothing."""
    code, line = run(capsys, inputs, folder, **options)
    assert code == 2 and line.startswith("zopro: error: "), line
    assert not (folder / "run").exists(), line
    return line.removeprefix("zopro: error: ")


# Model folders


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
    "a layer too many": (of("config.json", num_hidden_layers=3), "lack 'model.layers.2"),
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


# Configuration keys that only a model, a library or the machine can judge

OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a module that is not there": (
        {"lora_target_modules": "q_proj,nope"},
        "'nope' fits none of the model's. There are",
    ),
    "a regular expression for nothing": ({"lora_target_modules": "q_proj|v_proj"}, "must match whole names such as"),
    "no regular expression": ({"lora_target_modules": "("}, "it is no regular expression"),
    "norms": ({"lora_target_modules": "q_proj,input_layernorm"}, "Target module LlamaRMSNorm"),
    "a block": ({"lora_target_modules": "mlp"}, "Target module LlamaMLP"),
    "the head": ({"lora_target_modules": "q_proj,lm_head"}, "the output head cannot carry one"),
    "the reward model's head": ({"lora_target_modules": "score"}, "'score' fits none of the model's"),
    "all-linear and more": ({"lora_target_modules": "all-linear,lm_head"}, "'all-linear' fits none"),
    "no module": ({"lora_target_modules": ","}, "must be all-linear, names"),
    "a report to nobody": ({"report_to": "wadnb"}, "report_to: must be of .*Did you mean 'wandb'"),
    "an accelerator that is not here": ({"device": "meta"}, "device: must be auto, cpu, cuda or cuda:N, got 'meta'"),
    "half precision": ({"dtype": "float16"}, "dtype: must be auto, float32 or bfloat16, got 'float16'"),
    "a judge that is no model": ({"judge": "model:no/such/folder"}, "model: no folder and no Hub id"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_that_does_not_fit(name, inputs, tmp_path, capsys):
    options, words = OPTIONS[name]
    assert re.search(words, refused_at_once(capsys, inputs, tmp_path, **options))


def test_a_report_to_what_is_not_installed(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("zopro.train.callbacks.get_available_reporting_integrations", list)
    line = refused_at_once(capsys, inputs, tmp_path, report_to="tensorboard")
    assert line == "report_to: tensorboard must be installed, and is not. Install it, or leave it out."


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.type in ("int", "float")])
def test_numbers_that_nothing_can_hold(key, inputs, tmp_path, capsys):
    for value in (-1, 10**20 if FIELDS[key].type == "int" else 1e300):
        assert refused_at_once(capsys, inputs, tmp_path, **{key: value}).startswith(f"{key}: must ")


def test_a_run_that_can_be_written_nowhere(inputs, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for place in ("file", "file/run", "loop/run", "long" * 100):
        line = refused_at_once(capsys, inputs, tmp_path, output_dir=str(tmp_path / place))
        assert line.startswith("output_dir: must be a folder that can be written to, got "), line
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may write everywhere
    assert refused_at_once(capsys, inputs, tmp_path).startswith("output_dir: must be a folder that can be written to")


# Trainings that diverge


DIVERGING = {
    "sft_learning_rate": {"sft_steps": 1},
    "sft_learning_rate, in the middle": {"sft_steps": 3},
    "reward_learning_rate": {"reward_steps": 1},
    "reward_learning_rate, in the middle": {"reward_steps": 3},
    "first_order_learning_rate": {},
    "refine_learning_rate": {"warm_start": "sft"},
    "guided_learning_rate": {"method": "guided"},
}


@pytest.mark.parametrize("name", DIVERGING)
def test_a_stage_that_diverges_names_its_key_and_saves_nothing(name, inputs, tmp_path, capsys):
    key = name.split(",")[0]
    code, line = run(capsys, inputs, tmp_path, **{key: 1e20, **DIVERGING[name]})
    assert code == 2 and line.startswith(f"zopro: error: {key}: must be low enough to train with, got 1e+20: ")
    output = {"sft": "sft", "reward": "reward/000", "refine": "reward/001"}.get(key.split("_")[0], "policy/000")
    assert not (tmp_path / "run" / output).exists() and not list(tmp_path.rglob("*.partial"))
    for file in tmp_path.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), file


def test_a_diverged_run_can_be_resumed(inputs, tmp_path, capsys, monkeypatch):
    """NaN that came from elsewhere (a faulty card): the stage is done again, and the run ends as if nothing had been."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert run(capsys, inputs, whole)[0] == 0
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *given: lerp(*given) * torch.nan)
    code, line = run(capsys, inputs, broken)
    assert code == 2 and "refine_learning_rate" in line and "is not finite" in line
    assert not (broken / "run" / "reward" / "001").exists()
    monkeypatch.setattr(torch, "lerp", lerp)
    assert typed(capsys, "run", broken / "config.yaml", "--resume")[0] == 0
    assert fingerprint(broken / "run") == fingerprint(whole / "run")


def test_every_method_has_a_learning_rate():
    assert {RATE_KEYS.get(method, "learning_rate") for method in METHODS} <= set(FIELDS)


# Runs that somebody has damaged


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and what a stop in its SFT would have left of the trainer."""
    folder = tmp_path_factory.mktemp("finished")
    settings = config(inputs, folder / "run", iterations=1, policy_steps=1, warm_start="spsa", checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.write, "refresh", lambda run: None)
        patch.setattr(pipeline.write, "finish", lambda run: None)
        patch.setattr(pipeline, "clear", lambda folder: None)
        pipeline.run(settings, quiet=True)
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def resume(capsys: pytest.CaptureFixture[str], copy: Path) -> str:
    return refused(capsys, "run", copy / "config.yaml", "--resume", "--output_dir", copy)


NOISE = (b"", b"\x00\xff{", b"[1]\n")
RESUMED = ["environment.json", "metrics.jsonl", "evaluations/sft.json", "evaluations/sft.jsonl"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_record_is_named_when_a_run_is_resumed(name, copy, capsys):
    (copy / "summary.json").unlink()  # stopped on the way to it
    for noise in NOISE[1:]:
        (copy / name).write_bytes(noise + b"\n")
        assert str(copy / name) in resume(capsys, copy)


def test_a_record_that_is_gone(copy, capsys):
    (copy / "environment.json").unlink()
    assert "environment.json': must be there" in resume(capsys, copy)


CHECKPOINT = [
    *("parameters.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "counters.json"),
]


@pytest.mark.parametrize("name", CHECKPOINT)
def test_a_damaged_checkpoint_is_named(name, copy, capsys):
    for output in ("sft", "reward", "policy", "evaluations", "iterations"):
        shutil.rmtree(copy / output)
    file = copy / "trainer" / "sft" / "checkpoint-1" / name
    assert file.is_file()
    for noise in NOISE[:2]:
        file.write_bytes(noise)
        assert str(file.parent) in resume(capsys, copy)


def test_a_run_of_another_version(copy, capsys):
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    lacking = {key: value for key, value in settings.items() if key != "advantage"}
    (copy / "config.yaml").write_text(yaml.safe_dump(lacking))
    assert typed(capsys, "run", copy / "config.yaml", "--resume", "--output_dir", copy)[0] == 0, "an earlier one's"
    (copy / "config.yaml").write_text(yaml.safe_dump(settings | {"later_key": 1}))
    assert resume(capsys, copy) == "later_key: no such configuration key."
    (copy / "config.yaml").write_bytes(b"a: [")
    assert "valid YAML" in resume(capsys, copy)


READERS = {
    "generate": ("--prompt", "tea", "--max-new-tokens", "1"),
    "export": ("--out", "OUT"),
    "replay": ("--out", "OUT"),
    "analyse": ("--out", "OUT", "--projections", "pca"),
}
PLACES = ("absent", "file", "model", "run/policy", "run/sft", "x" * 300)


@pytest.mark.parametrize("command", READERS)
def test_a_folder_that_is_no_run(command, copy, inputs, tmp_path, capsys):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[command]]
    (tmp_path / "file").touch()
    (tmp_path / "model").symlink_to(inputs / "model")
    for place in PLACES:
        assert place in refused(capsys, command, tmp_path / place, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", READERS)
def test_a_run_whose_files_are_noise(command, copy, tmp_path, capsys):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[command]]
    damaged = {
        "generate": ("policy/000/adapter_model.safetensors", "policy/000/adapter_config.json", "config.yaml"),
        "export": ("policy/000/adapter_model.safetensors", "policy/000/adapter_config.json", "config.yaml"),
        "replay": ("iterations/000/journal.jsonl", "sft/adapter_model.safetensors", "config.yaml"),
        "analyse": ("policy/000/adapter_model.safetensors", "policy/000/adapter_config.json"),
    }
    for name in damaged[command]:
        whole = (copy / name).read_bytes()
        for noise in NOISE:
            (copy / name).write_bytes(noise)
            refused(capsys, command, copy, *words)
            assert not (tmp_path / "out").exists()
        (copy / name).write_bytes(whole)


def test_a_result_that_can_be_written_nowhere(copy, tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in ("export", "replay"):
        for place in ("file", "file/out", "long" * 100):
            assert place in refused(capsys, command, copy, "--out", tmp_path / place)


@pytest.mark.parametrize(
    "words", [["--temperature", "1e-300"], ["--temperature", "nan"], ["--seed", 2**70], ["--seed", -1]]
)
def test_numbers_that_cannot_be_sampled_with(words, copy, capsys):
    line = refused(capsys, "generate", copy, "--prompt", "tea", *words)
    assert words[0].removeprefix("--") in line and "must" in line


# What can happen anywhere


KNOWN = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "stopped: the memory is full"),
    (MemoryError(), 1, "stopped: the memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, "stopped: the memory is full"),
    (OSError(28, "No space left on device"), 1, "stopped: the disk is full"),
    (PermissionError(13, "Permission denied", "runs/a"), 2, "error: 'runs/a': Permission denied."),
    (Diverged("the loss of step 3 is nan"), 2, "error: learning rate: must be low enough"),
    (FloatingPointError("the logits are not finite"), 2, "error: learning rate: must be low enough"),
]


@pytest.mark.parametrize(("error", "code", "words"), KNOWN, ids=lambda value: type(value).__name__)
def test_a_known_error_is_one_line_wherever_it_comes_from(error, code, words, inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("zopro.loop.pipeline.run", fails)
    assert run(capsys, inputs, tmp_path)[0] == code
    with pytest.raises(type(error)):
        pipeline.run()
    assert explained(error)[1].startswith(words) and "\n" not in explained(error)[1]


def test_a_model_that_the_memory_does_not_hold(inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    code, line = run(capsys, inputs, tmp_path)
    assert code == 1 and line.startswith("zopro: stopped: the memory is full") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("y"), AssertionError(), RuntimeError("z"), OSError("w")])
def test_an_unknown_error_is_our_bug_and_shows_where(error, inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("zopro.loop.pipeline.run", fails)
    with pytest.raises(type(error)):
        run(capsys, inputs, tmp_path)
