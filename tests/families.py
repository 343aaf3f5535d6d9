"""A tiny model of each of transformers' causal families, from its own configuration class: two layers, width 32."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from zopro.weights.adapters import tensor_name

VOCABULARY = 96
# What sizes are called; a configuration gets those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(["hidden_size", "n_embd", "d_model", "embedding_size", "word_embed_proj_dim", "lru_width"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "shared_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 2),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "num_kv_heads", "linear_num_key_heads"], 2),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size", "attention_window_size"], 16),
    **dict.fromkeys(["n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "n_groups"], 1),
    **dict.fromkeys(["kv_lora_rank", "q_lora_rank", "v_head_dim", "qk_head_dim", "head_dim", "sliding_window"], 8),
    **dict.fromkeys(["qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim", "mamba_dt_rank", "time_step_rank"], 4),
    **dict.fromkeys(["mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_num_heads", "mamba_head_dim"], 8),
    **dict.fromkeys(["ssm_state_size", "state_size", "linear_key_head_dim", "linear_value_head_dim"], 8),
    **dict.fromkeys(["mamba_chunk_size", "chunk_size", "linear_num_value_heads"], 4),
    **dict.fromkeys(["attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout", "hidden_dropout"], 0.0),
    **{"vocab_size": VOCABULARY, "mamba_n_groups": 1, "mamba_expand": 2, "expand": 2, "use_mamba_kernels": False},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.15},
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
LATENT = {"num_key_value_heads": 4}  # multi-head latent attention has as many as query heads
# What some need beside, or otherwise.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "falcon_alibi": {"alibi": True, "new_decoder_architecture": False},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "glm4_moe_lite": LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {**LINEAR, **LATENT, "linear_num_heads": 4, "linear_head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "minicpm3": LATENT,
    "minimax": {**LINEAR, "block_size": 4},
    "nemotron_h": {"layer_types": ["mamba", "attention", "mlp"], "num_hidden_layers": 3},
    "olmo_hybrid": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba": {
        "layer_types": ["mamba", "hybrid"] * 3, "num_hidden_layers": 6, "n_mamba_heads": 2,
        "attention_head_dim": 16, "attention_hidden_size": 64,
    },
    "zamba2": {
        "layer_types": ["mamba", "hybrid"], "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8,
        "num_mem_blocks": 1, "hybrid_layer_ids": [1], "attention_hidden_size": 64, "attention_head_dim": 16,
    },
}  # fmt: skip
COPIES = 2
PROMPTS = [[5, 9, 71, 33, 20, 64, 8, 41, 90, 12, 77], [13, 50, 7, 28, 61, 44]]
ANSWERS = [[30, 6, 88, 15, 52], [47, 19, 3], [81, 66, 24, 10], [35, 59, 72, 4, 16]]
ROWS = [PROMPTS[i // COPIES] + answer for i, answer in enumerate(ANSWERS)]
VARIANTS = {"falcon_alibi": "falcon"}  # name -> model type


def family_model(name: str, **options: Any) -> PreTrainedModel:
    """A randomly initialised fp32 model in eval mode, always the same; weights wide enough for context to matter."""
    kind = VARIANTS.get(name, name)
    config_class = CONFIG_MAPPING[kind]
    known = set(inspect.signature(config_class.__init__).parameters)
    for base in config_class.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    sizes = {key: value for key, value in SIZES.items() if key in known - set(config_class.attribute_map)}
    config = config_class(**{**sizes, **OWN.get(name, {}), **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])(config)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask, padded on both sides, and the completions' length."""
    before, after = max(map(len, PROMPTS)), max(map(len, ANSWERS))
    pads = [(before - len(PROMPTS[i // COPIES]), after - len(answer)) for i, answer in enumerate(ANSWERS)]
    ids = torch.tensor([[0] * left + row + [0] * right for row, (left, right) in zip(ROWS, pads, strict=True)])
    mask = torch.tensor(
        [[0] * left + [1] * len(row) + [0] * right for row, (left, right) in zip(ROWS, pads, strict=True)]
    )
    return ids, mask, after


@cache
def family(name: str) -> Any:
    """The model with adapters that matter; tests leave it as it is."""
    model = family_model(name).requires_grad_(False)
    left_out = ["out_proj"] if name in ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h") else None
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=left_out, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return get_peft_model(model, config).eval()


def named(model: Any) -> dict[str, torch.Tensor]:
    return {tensor_name(name): p for name, p in model.named_parameters() if p.requires_grad}
