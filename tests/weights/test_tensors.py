"""One reader of safetensors files: whole, one tensor and in pieces are the same numbers, and damage is one line."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zopro.errors import InputError
from zopro.weights import adapters
from zopro.weights.adapters import tensor_files, tensor_name, weight_files
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE, MODEL_INDEX
from zopro.weights.tensors import read_header, read_tensor, read_whole, tensor_names
from zopro.weights.updates import policy_update, reward_update


@pytest.fixture
def file(tmp_path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(5, 7, generator=draw),
        "half": torch.randn(3, 2, generator=draw).bfloat16(),
        "scalar": torch.tensor(1.5),
        "count": torch.tensor([3, 4]),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_every_way_of_reading_gives_the_same_bits(file: Path) -> None:
    expected = load_file(file)
    whole, pieces = read_whole(file), read_header(file)
    assert set(tensor_names(file)) == set(whole) == set(expected) and pieces.keys() == expected.keys() - {"count"}
    for name, tensor in expected.items():
        for found in (whole[name], read_tensor(file, name)):
            assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    for name, stored in pieces.items():
        assert torch.equal(stored.flat(0, stored.numel).view(stored.shape), expected[name])
    assert torch.equal(pieces["a.weight"].columns(2, 5), expected["a.weight"][:, 2:5])


@pytest.mark.parametrize("damage", ["absent", "truncated", "noise", "empty"])
@pytest.mark.parametrize("reader", [read_whole, tensor_names, read_header, lambda file: read_tensor(file, "half")])
def test_damage_is_one_line_that_names_the_file(file: Path, damage: str, reader) -> None:
    data = file.read_bytes()
    file.write_bytes({"truncated": data[:-3], "noise": b"{" * 64, "empty": b""}.get(damage, b""))
    if damage == "absent":
        file.unlink()
    with pytest.raises(InputError) as error:
        reader(file)
    assert str(file) in str(error.value) and "must be a" in str(error.value) and "\n" not in str(error.value)


def test_a_model_has_the_files_that_its_index_names(file: Path) -> None:
    folder = file.parent
    save_file({"b": torch.ones(1)}, folder / "model.fp16.safetensors")
    assert len(weight_files(folder)) == 2
    (folder / MODEL_INDEX).write_text('{"weight_map": {"a.weight": "model.safetensors"}}')
    assert weight_files(folder) == [file] and "b" not in tensor_files(folder)
    for noise in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (folder / MODEL_INDEX).write_text(noise)
        with pytest.raises(InputError, match=r"index.json: must be an index"):
            weight_files(folder)


def test_an_adapter_of_any_name_is_named_as_the_model_is() -> None:
    for adapter in ("default", "my-adapter", "weights"):
        assert tensor_name(f"base_model.model.a.lora_A.{adapter}.weight") == "a.lora_A.weight"
    assert tensor_name("base_model.model.a.lora_A.weight") == "a.lora_A.weight"


def test_updates_need_two_folders_and_no_configuration(tmp_path: Path) -> None:
    """Whole models are subtracted tensor by tensor, adapters at once; against a model, an adapter is its product."""
    draw = torch.Generator().manual_seed(1)
    states = []
    for place in ("after", "before"):
        shapes = {"m.lora_A.weight": (2, 4), "m.lora_B.weight": (3, 2)}
        state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        (tmp_path / place).mkdir()
        save_file({f"base_model.model.{name}": tensor for name, tensor in state.items()}, tmp_path / place / ADAPTER_FILE)
        states.append(state)
    after, before = (tmp_path / place for place in ("after", "before"))
    (new_a, new_b), (old_a, old_b) = (state.values() for state in states)
    lora, whole = policy_update(after, before, full=False), policy_update(after, before, full=True)
    assert torch.equal(lora["m.lora_A.weight"], new_a - old_a)
    assert torch.equal(whole["base_model.model.m.lora_B.weight"], new_b - old_b)
    product = reward_update(after, before, full=True, alpha=6)
    assert torch.allclose(product["m.weight"], 3 * (new_b @ new_a - old_b @ old_a), atol=1e-5)
    assert torch.equal(reward_update(after, before, full=False, alpha=6)["m.lora_B.weight"], new_b - old_b)
    (after / ADAPTER_CONFIG).write_text('{"fan_in_fan_out": true}')  # of GPT-2, whose weights are (in, out)
    assert torch.equal(reward_update(after, before, full=True, alpha=6)["m.weight"], product["m.weight"].T)
    (after / ADAPTER_CONFIG).write_text("[]")
    with pytest.raises(InputError, match="must be an adapter's configuration, and cannot be read"):
        reward_update(after, before, full=True, alpha=6)
    with pytest.raises(InputError, match="must hold"):
        policy_update(after, tmp_path / "missing", full=True)
    with pytest.raises(InputError, match="does not exist"):
        policy_update(after, tmp_path / "missing", full=False)


def test_examples() -> None:
    failed, tried = doctest.testmod(adapters)
    assert tried and not failed
