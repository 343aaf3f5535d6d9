"""Trainings that diverge name the key to lower, save nothing, and can be resumed with another value."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file

from commands import run, typed
from tiny_runs import fingerprint

pytestmark = pytest.mark.usefixtures("quietly")

SMALL = {"sft_steps": 0, "reward_steps": 1, "pair_prompts": 2, "eval_prompts": 2}
COUNTED = {"reward": "length:9-9"}  # without a reward model
DIVERGING = {
    "sft_learning_rate": {"sft_steps": 1},
    "sft_learning_rate, in the middle": {"sft_steps": 3},
    "reward_learning_rate": {},
    "reward_learning_rate, in the middle": {"reward_steps": 3},
    "first_order_learning_rate": {**COUNTED, "method": "rloo"},
    "refine_learning_rate": {"warm_start": "sft"},
    "guided_learning_rate": {**COUNTED, "method": "guided"},
    "learning_rate": {**COUNTED, "warm_start": "sft"},
    "es_learning_rate": {**COUNTED, "method": "es", "population": 4},
}
ALL = {"lora_target_modules": "all-linear"}  # enough of them for one step to be too much


@pytest.mark.parametrize("name", DIVERGING)
def test_a_stage_that_diverges_names_its_key_and_saves_nothing(name, inputs, tmp_path, capsys):
    key = name.split(",")[0]
    code, line = run(capsys, inputs, tmp_path, **{key: 1e20, **ALL, **SMALL, **DIVERGING[name]})
    assert code == 2 and line.startswith(f"zopro: error: {key}: must be low enough to train with, got 1e+20: ")
    output = {"sft": "sft", "reward": "reward/000", "refine": "reward/001"}.get(key.split("_")[0], "policy/000")
    assert not (tmp_path / "run" / output).exists() and not list(tmp_path.rglob("*.partial"))
    for file in tmp_path.rglob("*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in load_file(file).values()), file


def test_a_diverged_run_can_be_resumed(inputs, tmp_path, capsys, monkeypatch):
    """NaN that came from elsewhere (a faulty card): the stage is done again, and the run ends as if nothing had been."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    assert run(capsys, inputs, whole, **SMALL)[0] == 0
    shutil.copytree(whole, broken)
    shutil.rmtree(broken / "run" / "reward" / "001")
    for file in [broken / "run" / "summary.json", *(broken / "run" / "evaluations").glob("000*")]:
        file.unlink()
    lerp = torch.lerp
    monkeypatch.setattr(torch, "lerp", lambda *given: lerp(*given) * torch.nan)
    again = ("run", broken / "run" / "config.yaml", "--resume")
    code, line = typed(capsys, *again)
    assert code == 2 and "refine_learning_rate" in line and "is not finite" in line
    assert not (broken / "run" / "reward" / "001").exists()
    monkeypatch.setattr(torch, "lerp", lerp)
    assert typed(capsys, *again)[0] == 0
    assert fingerprint(broken / "run") == fingerprint(whole / "run")
