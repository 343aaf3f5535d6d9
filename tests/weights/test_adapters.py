"""Saved adapters that are damaged, foreign or dangerous: named and refused wherever they are loaded."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tiny import tiny_model, tiny_tokenizer
from zopro import cli
from zopro.config import RunConfig
from zopro.engine.local import models
from zopro.engine.local.adapters import open_adapter
from zopro.errors import InputError
from zopro.loop.policies import Policies
from zopro.rewards import RewardModel

CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


class Trap:
    """A pickle that leaves a file behind when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def save_adapter(folder: Path, kind: str = "llama", **options: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})
        get_peft_model(tiny_model(kind, TOKENIZER), config).save_pretrained(folder)


TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run directory with the SFT policy and two others."""
    work = tmp_path_factory.mktemp("work")
    tiny_model("llama", TOKENIZER).save_pretrained(work / "base")
    TOKENIZER.save_pretrained(work / "base")
    for part in ("sft", "policy/000", "policy/001"):
        save_adapter(work / "run" / part)
    config = RunConfig(model=str(work / "base"), task="chat", train_data="x", dtype="float32", device="cpu", lora_r=2)
    (work / "run" / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    return work / "run"


@pytest.fixture
def run(whole, tmp_path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def first(tensors: dict[str, torch.Tensor]) -> str:
    return min(tensors)


def truncated(folder: Path) -> None:
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])


def of_noise(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(bytes(range(256)) * 8)


def with_nan(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[first(tensors)].view(-1)[:1].fill_(torch.nan))


def with_infinity(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors[first(tensors)].view(-1)[-1:].fill_(-torch.inf))


def lacking(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.pop(first(tensors)))


def with_more(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"base_model.model.other.lora_A.weight": torch.ones(2, 2)}))


def of_another_rank(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({first(tensors): torch.ones(3, 32)}))


def of_another_architecture(folder: Path) -> None:
    shutil.rmtree(folder)
    save_adapter(folder, "gpt_neox", target_modules=["query_key_value"])


def of_another_width(folder: Path) -> None:
    shutil.rmtree(folder)
    with torch.random.fork_rng(devices=[]):
        base = tiny_model("llama", TOKENIZER, hidden_size=64)
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"a": Trap(folder / "sprung")}))


def with_a_broken_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{")


def of_another_kind(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"peft_type": "PROMPT_TUNING"}))


DAMAGE = {
    truncated: "is damaged",
    of_noise: "is damaged",
    with_nan: "lora_A.* is not finite",
    with_infinity: "lora_A.* is not finite",
    lacking: "must be an adapter of this model, but .*lora_A.* is not in the file",
    with_more: "must be an adapter of this model, but other.lora_A.weight is not in the model",
    of_another_rank: "must be an adapter of this model, but .*size mismatch",
    of_another_architecture: "must be an adapter of this model, but ",
    of_another_width: "must be an adapter of this model, but .*size mismatch",
    pickled: "does not exist",
    with_a_broken_configuration: "adapter_config.json' cannot be read",
    of_another_kind: "must be of the type LORA, got 'PROMPT_TUNING'",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_the_loop_refuses_it(damage, run):
    folder = run / "policy" / "001"
    damage(folder)
    base = tiny_model("llama", TOKENIZER)
    config = RunConfig(model="m", task="chat", train_data="x", lora_r=2)
    with pytest.raises(InputError, match=DAMAGE[damage]) as error, Policies(base, config).open(folder):
        pass
    assert str(folder) in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "sprung").exists()


def lines(capsys, *argv: str) -> list[str]:
    """What a command that refuses says: one line, exit code 2, nothing on stdout."""
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("zopro: error: ")]
    assert out == "" and len(said) == 1 and "Traceback" not in err
    return said


@pytest.mark.parametrize("damage", [truncated, with_nan, of_another_architecture, pickled], ids=lambda d: d.__name__)
@pytest.mark.parametrize("command", ["generate", "export", "merge", "analyse"])
def test_commands_refuse_it(damage, command, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    words = {
        "generate": ["generate", str(run), "--prompt", "tea"],
        "export": ["export", str(run), "--out", str(tmp_path / "out")],
        "merge": ["export", str(run), "--out", str(tmp_path / "out"), "--merged"],
        "analyse": ["analyse", "--policy", str(run / "policy"), "--reward", str(run / "policy")],
    }[command]
    if command == "export" and damage is of_another_architecture:
        pytest.skip("a copy needs no model, so it is not compared with one")
    folder = run / "policy" / "001"
    damage(folder)
    if command != "analyse" and damage is pickled:
        words += ["--iteration", "1"]  # without weights it is not the newest policy
    (line,) = lines(capsys, *words)
    assert str(folder) in line or "--iteration: must be one of 0" in line
    assert not (tmp_path / "out").exists() and not (folder / "sprung").exists()


def test_generate_refuses_a_damaged_sft_policy_too(run, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    with_nan(run / "sft")
    (line,) = lines(capsys, "generate", str(run), "--prompt", "tea")
    assert str(run / "sft" / WEIGHTS) in line and "not finite" in line


@pytest.mark.parametrize("damage", [truncated, with_nan, lacking, pickled], ids=lambda damage: damage.__name__)
def test_a_reward_model_is_refused_as_well(damage, tmp_path):
    classifier = models.sequence_classifier(tiny_model("llama", TOKENIZER), TOKENIZER, seed=0)
    options = RunConfig(model="m", task="chat", train_data="x", lora_r=2)
    with torch.random.fork_rng(devices=[]):
        reward = RewardModel(get_peft_model(classifier, models.lora_config(options, "SEQ_CLS")), TOKENIZER, 32)
    reward.save(tmp_path / "000")
    reward.restore(tmp_path / "000")
    damage(tmp_path / "000")
    with pytest.raises(InputError):
        reward.restore(tmp_path / "000")


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"max_length": "x", "offset": 0, "score_mean": 0, "score_std": 1}'])
def test_a_reward_models_record_is_checked(record, tmp_path):
    (tmp_path / "reward.json").write_text(record)
    with pytest.raises(InputError, match=r"reward.json: must hold max_length, offset"):
        RewardModel.restore(None, tmp_path)


def test_models_are_read_from_safetensors_only(tmp_path):
    tiny_model("llama", TOKENIZER).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap(tmp_path / "sprung")}))
    with pytest.raises(InputError, match="model: cannot load"):
        models.load_base(str(tmp_path), torch.float32, CPU)
    assert not (tmp_path / "sprung").exists()


def test_code_that_comes_with_a_model_is_not_run_unasked(tmp_path):
    tiny_model("llama", TOKENIZER).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'sprung')!r}).touch()\nclass Any: pass\n"
    (tmp_path / "evil.py").write_text(code)
    path = tmp_path / "config.json"
    foreign = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Any", "AutoModelForCausalLM": "evil.Any"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | foreign))
    with pytest.raises(InputError, match="trust_remote_code"):
        models.load_base(str(tmp_path), torch.float32, CPU)
    assert not (tmp_path / "sprung").exists()


def test_nothing_in_the_source_trusts_or_unpickles():
    for path in (Path(__file__).parents[2] / "src").rglob("*.py"):
        source = path.read_text("utf-8")
        assert not re.search(r"trust_remote_code\s*=\s*True|import pickle|pickle\.load|allow_pickle=True", source), path
        for call in re.findall(r"torch\.load\([^)]*\)", source):
            assert "weights_only=True" in call, path


def test_an_adapter_is_opened_under_a_name_beside_another(whole):
    model = open_adapter(tiny_model("llama", TOKENIZER), whole / "policy" / "000", "aligned")
    assert open_adapter(model, whole / "sft", "sft") is model
    assert {"aligned", "sft"} <= set(model.peft_config)
