"""The policy that KL is measured to, for every kind of adapter that PEFT has a second one of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    DeloraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    ShiraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
    load_peft_weights,
)

from tiny_trainers import llama, online, with_adapter
from zopro import ZOPrOConfig, ZOPrOTrainer
from zopro.errors import InputError
from zopro.train.construction import trainable
from zopro.weights.live import by_saved_names, saved_state

pytestmark = pytest.mark.usefixtures("random_state")

IDS = torch.tensor([[5, 6, 7, 8, 9, 3, 4]])
KINDS: dict[str, tuple[type[PeftConfig], dict[str, Any]]] = {
    "embeddings": (LoraConfig, {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}),
    "tokens": (LoraConfig, {"r": 2, "trainable_token_indices": [3, 4]}),
    "dora": (LoraConfig, {"r": 2, "use_dora": True}),
    "modules": (LoraConfig, {"r": 2, "modules_to_save": ["lm_head"]}),
    "ia3": (IA3Config, {"feedforward_modules": []}),
    "vera": (VeraConfig, {"r": 2}),
    "loha": (LoHaConfig, {"r": 2}),
    "shira": (ShiraConfig, {"r": 2}),
    "vblora": (VBLoRAConfig, {"r": 2, "num_vectors": 4, "vector_length": 4}),
    "delora": (DeloraConfig, {"r": 2}),
    "norms": (LNTuningConfig, {"target_modules": ["input_layernorm"]}),
}


def trained(kind: str) -> PeftModel:
    cls, options = KINDS[kind]
    config = cls(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})  # type: ignore[arg-type]
    model = get_peft_model(llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def made(folder: Path, model: Any, **options: Any) -> Any:
    return online(ZOPrOTrainer, ZOPrOConfig, folder, {"model": model, "beta": 0.1, **options})


@torch.no_grad()
def logits(model: PeftModel, adapter: str) -> torch.Tensor:
    model.set_adapter(adapter)
    return model.eval()(IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_where_training_starts_or_what_was_saved(kind: str, tmp_path: Path) -> None:
    """TRL copies what has ".default." in its name."""
    model = trained(kind)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    start, saved = logits(model, "default"), load_peft_weights(str(tmp_path / "saved"), "cpu")
    trainer = made(tmp_path, model)
    names = {name for name, _ in trainable(trainer.model)}
    assert names <= by_saved_names(saved, trainer.model).keys(), "updates and references come by the names of files"
    live = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert names == by_saved_names(live, trainer.model).keys(), "or of a model in memory"
    assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if ".ref." in f"{name}.")
    assert torch.equal(logits(trainer.model, "default"), start)
    assert torch.equal(logits(trainer.model, "ref"), start)

    given = {name: tensor + tensor if tensor.is_floating_point() else tensor for name, tensor in saved.items()}
    trainer = made(tmp_path, trained(kind), reference=given)
    own = saved_state(trainer.model, "ref")
    assert own.keys() == given.keys() and all(torch.equal(own[name], given[name]) for name in own)
    assert saved.keys() == given.keys()


def test_a_reference_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    given = {name: torch.zeros(3, 3) for name in saved_state(with_adapter(), "default")}
    name = "model.layers.0.mlp.down_proj.lora_A.weight"
    said = rf"^reference: must have .* tensors in their shapes, got (.*) for '{name}', where the policy has (.*)\.$"
    with pytest.raises(ValueError, match=said) as error:
        made(tmp_path, with_adapter(), reference=given)
    assert re.findall(said, str(error.value)) == [("(3, 3)", "(2, 16)")]
    with pytest.raises(ValueError, match=said) as error:
        made(tmp_path, with_adapter(), reference={})
    assert re.findall(said, str(error.value)) == [("None", "(2, 16)")]


def test_adapters_that_can_hold_no_reference_are_refused(tmp_path: Path) -> None:
    config = AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(InputError, match=r"^beta: must be 0 for adapters of the kind ADAPTION_PROMPT, .* got 0\.1\."):
        made(tmp_path, get_peft_model(llama(), config))
    made(tmp_path, get_peft_model(llama(), config), beta=0.0)
