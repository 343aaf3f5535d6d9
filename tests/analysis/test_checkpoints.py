"""Which checkpoints are found, in which order, and the one line that names the file of one that does not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from walks import dense_walk, lora_walk, write
from zopro.analysis.analyse import analyse
from zopro.analysis.command import _text
from zopro.analysis.reading.checkpoints import AdapterOptions, of_folder, of_run
from zopro.analysis.reading.parts import Part, pair
from zopro.errors import InputError
from zopro.system.terminal import Page
from zopro.system.threads import torch_threads
from zopro.weights.adapters import weight_name

A, B = "base_model.model.model.layers.0.up.lora_A.weight", "base_model.model.model.layers.0.up.lora_B.weight"


def adapter(**change: torch.Tensor | None) -> dict[str, torch.Tensor]:
    tensors = {A: torch.ones(2, 5), B: torch.ones(4, 2), **change}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def tree(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        write(root / name, adapter(**{A: torch.full((2, 5), float(i + 1))}))
    return root


def refused(*sides: Path) -> str:
    with pytest.raises(InputError) as error:
        analyse(*(of_folder(side, name) for side, name in zip(sides, ("policy", "reward"), strict=True)))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_names_are_ordered_naturally(tmp_path):
    names = [f"checkpoint-{step}" for step in (0, 9, 10, 100)]
    tree(tmp_path, *reversed(names))
    (tmp_path / "logs").mkdir()
    assert [c.label for c in of_folder(tmp_path, "policy").checkpoints] == names


def test_what_lies_beside_a_trainers_checkpoints_is_said(tmp_path, caplog):
    """Its last weights above them are not taken; other folders are, in the order of their names."""
    tree(tmp_path, ".", "checkpoint-9", "checkpoint-10")
    assert [c.label for c in of_folder(tmp_path, "policy").checkpoints] == ["checkpoint-9", "checkpoint-10"]
    assert caplog.messages == [f"--policy: takes the 2 checkpoints inside '{tmp_path}', not its own weights."]
    tree(tmp_path, "best")
    assert len(of_folder(tmp_path, "policy").checkpoints) == 3
    assert "in this order: best, checkpoint-9, checkpoint-10. Move away" in caplog.messages[-1]


def test_single_files_are_checkpoints_too(tmp_path):
    for name in ("step2.safetensors", "step10.safetensors"):
        save_file(adapter(), tmp_path / name)
    assert [c.label for c in of_folder(tmp_path, "policy").checkpoints] == ["step2", "step10"]


def test_a_model_in_several_files(tmp_path):
    for step in range(2):
        place = tmp_path / str(step)
        place.mkdir()
        index = {}
        for i, name in enumerate(("model.layers.0.a.weight", "model.layers.1.a.weight")):
            file = f"model-0000{i + 1}-of-00002.safetensors"
            save_file({name: torch.full((3,), float(step + i))}, place / file)
            index[name] = file
        (place / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert len(of_folder(tmp_path, "policy").tensors) == 2
    missing = tmp_path / "1" / "model-00002-of-00002.safetensors"
    missing.unlink()
    with pytest.raises(InputError, match=re.escape(str(missing))):
        of_folder(tmp_path, "policy")


def run_directory(root: Path) -> Path:
    for i, name in enumerate(("sft", "policy/000", "policy/001", "reward/000", "reward/001", "reward/002")):
        write(root / name, adapter(**{A: torch.full((2, 5), float(i + 1))}))
    return root


def test_a_run_starts_with_sft(tmp_path):
    policy, reward = of_run(run_directory(tmp_path))
    assert [c.label for c in policy.checkpoints] == ["SFT", "policy 0", "policy 1"]
    assert [c.label for c in reward.checkpoints] == ["reward 0", "reward 1", "reward 2"]
    (tmp_path / "config.yaml").write_text("sft_steps: 0")
    assert of_run(tmp_path)[0].checkpoints[0].label == "start", "nothing was fine-tuned"
    assert analyse(policy, reward)["iterations"] == [0, 1]


def test_the_number_of_threads_stays(tmp_path, monkeypatch):
    """numba, which UMAP uses, sets the process's number; a run goes on after its report."""

    def changes(*sides):
        torch.set_num_threads(5)
        return pair(*sides)

    monkeypatch.setattr("zopro.analysis.analyse.pair", changes)
    with torch_threads(3):
        analyse(*of_run(run_directory(tmp_path)))
        assert torch.get_num_threads() == 3


def test_snapshots_lie_between_iterations_and_leave_the_metrics_alone(tmp_path):
    plainly = analyse(*of_run(run_directory(tmp_path)))
    for place in ("policy/001/000005", "policy/001/000010", "reward/000/000003"):
        write(tmp_path / "snapshots" / place, adapter(**{A: torch.full((2, 5), 2.5)}))
    policy, reward = of_run(tmp_path)
    labels = ["SFT", "policy 0", "policy 1, step 5", "policy 1, step 10", "policy 1"]
    assert [c.label for c in policy.checkpoints] == labels
    assert [c.label for c in reward.checkpoints][:2] == ["reward 0", "reward 0, step 3"]
    finely = analyse(policy, reward)
    assert finely["metrics"] == plainly["metrics"]
    shown = finely["trajectories"]["product"]["pca"]["policy"]
    assert len(shown["points"]["2d"]) == 5 and shown["main"] == [0, 1, 4]


@pytest.mark.parametrize("missing", ["policy/000", "reward/000", "reward/001"])
def test_a_missing_iteration_is_named(tmp_path, missing):
    """Else the updates after it were set beside others'."""
    run = run_directory(tmp_path / "run")
    (run / missing).rename(tmp_path / "away")
    with pytest.raises(InputError, match=f"^{re.escape(str(run / missing))}: must be there"):
        of_run(run)


def test_a_reward_model_that_is_not_refined_yet_is_none(tmp_path):
    """The policy of a run that stopped in its first iteration has moved all the same."""
    run = run_directory(tmp_path)
    for later in ("policy/001", "reward/001", "reward/002"):
        (run / later).rename(run / later.replace("/", " "))
    policy, reward = of_run(run)
    numbers = analyse(policy, reward)
    assert numbers["reward"] == reward.checkpoints == [] and numbers["iterations"] == [0]
    assert numbers["metrics"]["policy_update_norm"]["factors"] == [pytest.approx(10**0.5)]
    printed = Page(*_text(numbers, {"report": "report.html"}))
    assert "in 1 weight)" in printed and "The policy moved by a length of" in printed and "by chance" not in printed
    with pytest.raises(InputError, match=r"^--reward-ema: must be 1 for a run without a reward model, got 0\.5\.$"):
        analyse(policy, reward, reward_ema=0.5)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("sft", "sft: must be there, .* Restore it"),
        ("reward/000", "must"),
        ("policy/000/adapter_model.safetensors", "must"),
        ("policy", "at least 2 checkpoints to compare, got .*sft. Save more of them, or train on"),
    ],
)
def test_a_run_that_lacks_something(tmp_path, missing, said):
    run = run_directory(tmp_path / "run")
    (run / missing).rename(tmp_path / "away")
    if missing == "reward/000":
        (run / "reward/001").rename(tmp_path / "away too")
    with pytest.raises(InputError, match=said):
        of_run(run)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [A, B])
def test_numbers_that_are_none_are_named(tmp_path, bad, name):
    policy, reward = tree(tmp_path / "p", "1", "2", "3"), tree(tmp_path / "r", "1", "2", "3")
    tensors = adapter()
    tensors[name][1, 1] = bad
    place = write(reward / "2", tensors)
    message = refused(policy, reward)
    assert str(place / "adapter_model.safetensors") in message and weight_name(name) in message


def test_a_whole_model_with_nan(tmp_path):
    points = torch.ones(3, 30).double().numpy()
    policy, reward = dense_walk(tmp_path / "p", points).folder, dense_walk(tmp_path / "r", points * 2).folder
    points[1, 7] = float("nan")
    broken = dense_walk(tmp_path / "q", points).folder
    assert str(broken / "step1") in refused(broken, reward)
    assert str(broken / "step1") in refused(policy, broken)


def test_numbers_that_are_too_large_to_be_squared(tmp_path):
    points = np.outer([0.0, 1.0, 3.0], np.full(30, 1e160))
    policy, reward = dense_walk(tmp_path / "p", points).folder, dense_walk(tmp_path / "r", points).folder
    assert refused(policy, reward).startswith("model.layers.0.mlp.down_proj.weight: must be of numbers whose squares")


@pytest.mark.parametrize("keep", [0, 5, 60, -1, -30])
def test_a_truncated_file_is_named(tmp_path, keep):
    policy, reward = tree(tmp_path / "p", "1", "2", "3"), tree(tmp_path / "r", "1", "2", "3")
    file = policy / "2" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(policy, reward)
    assert str(file) in message and ("whole safetensors file" in message)


def test_garbage_is_named(tmp_path):
    policy, reward = tree(tmp_path / "p", "1", "2"), tree(tmp_path / "r", "1", "2")
    file = policy / "2" / "adapter_model.safetensors"
    file.write_bytes((20).to_bytes(8, "little") + b"this is no JSON text" + bytes(200))
    assert str(file) in refused(policy, reward)


def test_tensors_that_do_not_match_are_named(tmp_path):
    policy, reward = tree(tmp_path / "p", "1", "2"), tree(tmp_path / "r", "1", "2")
    write(policy / "3", adapter(**{A: torch.ones(3, 5), B: torch.ones(4, 3)}))
    assert str(policy / "3") in (message := refused(policy, reward)) and "(2, 5)" in message
    write(policy / "3", adapter(**{B: None}))
    assert str(policy / "3") in (message := refused(policy, reward)) and "lora_B" in message


def test_the_two_must_be_of_one_model(tmp_path):
    policy, reward = tree(tmp_path / "p", "1", "2"), tmp_path / "r"
    for name in "12":
        write(reward / name, {A: torch.ones(2, 6), B: torch.ones(4, 2)})
    assert str(reward / "1") in (message := refused(policy, reward)) and "(4, 6)" in message
    for name in "12":
        write(reward / name, {"other.lora_A.weight": torch.ones(2, 6), "other.lora_B.weight": torch.ones(4, 2)})
    assert "weights in common" in refused(policy, reward)


def test_square_weights_are_stored_in_one_way(tmp_path):
    for side, turned in (("p", False), ("r", True)):
        for name in "12":
            write(tmp_path / side / name, {A: torch.ones(2, 4), B: torch.ones(4, 2)}, {"fan_in_fan_out": turned})
    message = refused(tmp_path / "p", tmp_path / "r")
    assert str(tmp_path / "r/1") in message and "must have the fan_in_fan_out of" in message


def test_folders_that_hold_no_checkpoints(tmp_path):
    one = tree(tmp_path / "p", "1")
    with pytest.raises(InputError, match="no such folder"):
        of_folder(tmp_path / "absent", "policy")
    with pytest.raises(InputError, match="at least 2"):
        of_folder(one, "policy")
    with pytest.raises(InputError, match="Give the one above"):
        of_folder(one / "1", "policy")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="which has none"):
        of_folder(tmp_path / "empty", "policy")
    (one / "2").mkdir()
    (one / "2" / "adapter_model.bin").touch()
    with pytest.raises(InputError, match="pickle"):
        of_folder(one, "policy")
    for text, said in (("{", "cannot be read"), ('{"alpha_pattern": {"*bad(": 3}}', r"expressions, got '\*bad\('")):
        (one / "1" / "adapter_config.json").write_text(text)
        with pytest.raises(InputError, match=rf"adapter_config\.json: .*{said}"):
            of_folder(one, "policy")


def test_different_ranks_share_only_the_product(tmp_path):
    sides = [of_folder(lora_walk(tmp_path / n, rank=r, seed=r).folder, n) for n, r in (("policy", 2), ("reward", 5))]
    pairing = pair(*sides)
    assert pairing.views == ("product",)


def test_the_size_of_the_product_follows_the_adapter_configuration():
    assert AdapterOptions(alpha=16).scale("model.layers.0.up", 8) == 2
    assert AdapterOptions(alpha=16, rslora=True).scale("model.layers.0.up", 16) == 4
    assert AdapterOptions(alpha=16, alpha_pattern={"up": 4}).scale("model.layers.0.up", 8) == 0.5
    assert AdapterOptions().scale("model.layers.0.up", 8) == 1


def test_names_lose_what_peft_wraps_around_them():
    assert weight_name("base_model.model.model.a.lora_A.my_adapter.weight") == "model.a.lora_A.weight"
    assert weight_name("base_model.model.score.modules_to_save.default.weight") == "score.weight"
    assert weight_name("base_model.model.emb.lora_embedding_A.default") == "emb.lora_embedding_A"
    assert weight_name(A) == "model.layers.0.up.lora_A.weight"


def test_layers_and_modules_are_read_from_names():
    assert Part("transformer.h.11.attn.c_proj.weight", ()).layer == "layer 11"
    assert Part("transformer.h.11.attn.c_proj.weight", ()).module == "c_proj"
    assert Part("model.embed_tokens.weight", ()).layer == "other"
