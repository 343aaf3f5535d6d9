"""Weights that are saved are whole: no NaN, no infinity, and a model that still answers; the one place looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from families import family_model
from tiny import tiny_model, tiny_tokenizer
from zopro.errors import Diverged, InputError, diverging
from zopro.weights.adapters import tensor_files
from zopro.weights.saving import publish, save_tensors, save_weights

SOURCE = Path(__file__).parents[2] / "src" / "zopro"
TOKENIZER = tiny_tokenizer()


def adapter(name: str = "default") -> Any:
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(tiny_model("llama", TOKENIZER), config, adapter_name=name)


def classifier() -> Any:
    config = LoraConfig(r=2, target_modules=["up_proj"], task_type="SEQ_CLS", modules_to_save=["score"])
    base = tiny_model("llama", TOKENIZER).config
    base.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(LlamaForSequenceClassification(base), config)


@pytest.mark.parametrize("kind", ["gpt_neox", "qwen3_moe", "granitemoehybrid"])
def test_files_of_a_run_have_the_names_in_memory_and_what_is_published_those_of_others(kind: str, tmp_path: Path) -> None:
    """transformers fuses experts and renames heads as it loads a model; updates and journals go by what is trained."""
    model = family_model(kind)
    live = dict(model.named_parameters())
    save_weights(model, tmp_path / "run")
    publish(model, tmp_path / "out")
    assert set(tensor_files(tmp_path / "run")) >= set(live)
    assert not set(tensor_files(tmp_path / "out")) >= set(live)
    for folder in ("run", "out"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
        assert all(torch.equal(p, live[name]) for name, p in loaded.named_parameters())


MODELS = {
    "model": lambda: tiny_model("llama", TOKENIZER),
    "adapter": adapter,
    "adapter of another name": lambda: adapter("other"),
    "reward model": classifier,
}


def trained(model: Any) -> list[torch.Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("damage", [torch.nan, torch.inf, -torch.inf, 2e6, "far too large"])
def test_what_is_not_finite_or_beyond_all_use_is_not_saved(kind, damage, tmp_path):
    model = MODELS[kind]().train()
    generator = torch.Generator().manual_seed(0)
    for parameter in trained(model):
        if damage == "far too large":  # each number is finite, and what comes of them is not
            large = 1e18 if kind == "model" else 1e25
            parameter.data = large * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data.view(-1)[-1] = damage
    with pytest.raises(Diverged, match=r"has weights of 2e\+06" if damage == 2e6 else "is not finite"):
        save_weights(model, tmp_path)
    assert not list(tmp_path.iterdir()) and model.training


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_whole_is_saved_as_it_is(kind, tmp_path):
    model = MODELS[kind]().train()
    state = torch.get_rng_state()
    save_weights(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    saved = load_file(tmp_path / ("model.safetensors" if kind == "model" else "adapter_model.safetensors"))
    assert len(saved) == len(trained(model)) and all(parameter.grad is None for parameter in model.parameters())


def test_tensors_of_a_file(tmp_path):
    save_tensors({"a": torch.ones(2), "b": torch.tensor([1])}, tmp_path / "a.safetensors")
    with pytest.raises(Diverged, match="a is not finite"):
        save_tensors({"a": torch.tensor([1.0, torch.nan])}, tmp_path / "b.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_only_what_diverged_is_laid_to_the_learning_rate():
    line = r"^rate: must be low enough to train with, got 3: the loss is nan\. Nothing"
    with pytest.raises(InputError, match=line), diverging("rate", 3.0):
        raise Diverged("the loss is nan")
    with pytest.raises(InputError, match=r"^rate: must be low enough .* not finite\. Nothing"), diverging("rate", 3.0):
        raise FloatingPointError("the logits are not finite.")
    with pytest.raises(InputError, match=r"^else$"), diverging("rate", 3.0):
        raise InputError("else")


def test_there_is_one_place():
    """Models and files of tensors are written in zopro.weights.saving alone, but for the demo's random model."""
    for path in SOURCE.rglob("*.py"):
        if path.name == "saving.py" or path.parent.name == "demo":
            continue
        source = path.read_text("utf-8")
        assert "save_file(" not in source and "torch.save(" not in source, path
        assert source.count(".save_pretrained(") == source.count("tokenizer.save_pretrained("), path
