"""Adapters that have more than a serving engine takes are refused; nothing of them is left out."""

from __future__ import annotations

from typing import Any

import pytest
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model

from tiny_trainers import llama
from zopro.engine.servers.adapters import lora_tensors
from zopro.errors import InputError

pytestmark = [pytest.mark.usefixtures("random_state"), pytest.mark.filterwarnings("ignore:`lora_bias")]


def lora(**options: Any) -> PeftConfig:
    return LoraConfig(**{"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (lora(use_dora=True), "Dora"),
        (lora(lora_bias=True), "model.layers.0.self_attn.q_proj.lora_B.bias"),
        (lora(use_dora=True, target_modules=["embed_tokens"]), "Dora"),
        (lora(modules_to_save=["lm_head"]), "lm_head.weight"),
        (lora(trainable_token_indices=[3]), "model.embed_tokens.token_adapter.trainable_tokens_delta"),
        (lora(target_modules=["embed_tokens"]), "model.embed_tokens.lora_embedding_A"),
        (lora(alora_invocation_tokens=[3]), "ALora"),
        (IA3Config(target_modules=["v_proj"], feedforward_modules=[]), "model.layers.0.self_attn.v_proj.ia3_l"),
    ],
    ids=lambda value: "" if isinstance(value, PeftConfig) else value.rpartition(".")[2],
)
def test_adapters_of_more_than_a_and_b_are_refused(config: PeftConfig, named: str) -> None:
    model = get_peft_model(llama(), config)
    with pytest.raises(
        InputError, match=rf"^engine: must be given an adapter of A and B alone \(LoRA\), got {named} too"
    ):
        lora_tensors(model)
    with model.disable_adapter():
        assert lora_tensors(model) == ({}, 1.0)


def test_scaled_and_ranked_adapters_are_taken_whole() -> None:
    tensors, alpha = lora_tensors(get_peft_model(llama(), lora(use_rslora=True, rank_pattern={"q_proj": 4})))
    assert alpha == 16 and {name.rpartition("q_proj.")[2] for name in tensors} == {"lora_A.weight", "lora_B.weight"}
