"""The residual stream, found by what a probe's numbers say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GraniteConfig, GraniteForCausalLM, OPTConfig, OPTForCausalLM

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.feedback.stream import residual_stream
from zopro.errors import InputError

WRITES = {
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "mistral": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma3": ("self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
}


def names(model: Any) -> list[tuple[str, ...]]:
    return [tuple(".".join(w.name.split(".")[2:]) for w in block.writes) for block in residual_stream(model).blocks]


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "mistral"])
def test_found_in_every_family(kind: str, adapted: bool) -> None:
    model = tiny_model(kind, tiny_tokenizer())
    if adapted:
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    assert names(model) == [WRITES[kind]] * 2
    stream = residual_stream(model)
    assert stream.final_norm is not None
    for block in stream.blocks:
        assert block.parallel == (kind == "gpt_neox")
        assert block.mlp is not None and block.mlp.pre_norm is not None
        assert all((write.norm is not None) == (kind == "gemma3") for write in block.writes)
        assert all(write.scale == 1.0 for write in block.writes)


def test_square_projections_are_not_mistaken_for_writes() -> None:
    """Query, key and value as wide as the stream: only their numbers tell them from what writes to it."""
    model = tiny_model("llama", tiny_tokenizer(), num_key_value_heads=4, intermediate_size=32)
    assert names(model) == [WRITES["llama"]] * 2


def test_bfloat16() -> None:
    assert names(tiny_model("gemma3", tiny_tokenizer()).bfloat16()) == [WRITES["gemma3"]] * 2


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox"])
def test_a_branch_adds_what_the_block_s_mlp_adds(kind: str) -> None:
    model = tiny_model(kind, tiny_tokenizer())
    block = residual_stream(model).blocks[0]
    assert block.mlp is not None
    attention = block.writes[0].norm or block.writes[0].layer
    seen: dict[str, torch.Tensor] = {}
    block.mlp.reads.register_forward_hook(lambda m, args, out: seen.update(read=args[0][0]))
    attention.register_forward_hook(lambda m, args, out: seen.update(attention=out[0]))
    block.module.register_forward_hook(lambda m, args, out: seen.update(out=out.squeeze(0)))
    with torch.no_grad():
        model(input_ids=torch.arange(3, 9)[None])
        before = seen["read"] + (seen["attention"] if block.parallel else 0.0)
        assert torch.allclose(before + block.mlp(seen["read"]), seen["out"], atol=1e-5)


def test_scaled_residuals() -> None:
    config = GraniteConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, residual_multiplier=0.25, initializer_range=0.2,
    )  # fmt: skip
    stream = residual_stream(GraniteForCausalLM(config).eval())
    assert [write.scale for block in stream.blocks for write in block.writes] == pytest.approx([0.25] * 4, abs=1e-3)


def test_norms_on_the_stream_itself_are_refused() -> None:
    """OPT's post-norm variant normalises the stream after every addition: nothing is carried along unchanged."""
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        do_layer_norm_before=False, max_position_embeddings=64, pad_token_id=0, init_std=0.2,
    )  # fmt: skip
    with pytest.raises(InputError, match=r"model: OPTForCausalLM has no residual stream that can be followed"):
        residual_stream(OPTForCausalLM(config).eval())
