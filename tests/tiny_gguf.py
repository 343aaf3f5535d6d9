"""A tiny transformers model as a GGUF file that llama.cpp loads, written with llama.cpp's own package `gguf`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

PERMUTED = {"llama"}


def write_gguf(
    path: Path, model: Any, tokenizer: Any, kind: str, quantised: str = "F32", tensors_a_file: int = 0, long_rope: int = 0
) -> Path:
    """Of a Llama or Qwen3 model, as the converter writes it; matrices in a type of GGUF, for example Q8_0.

    long_rope: tokens of its original context, beyond which it turns slower (LongRoPE); 0: it never does.

    Returns the file, or the first of those of `tensors_a_file`.
    """
    import gguf

    config, weights = model.config, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, kind, split_max_tensors=tensors_a_file)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if quantised == "F32" else gguf.LlamaFileType.MOSTLY_Q8_0)
    if long_rope:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(long_rope)
        writer.add_rope_scaling_attn_factors(1.0)
        for name, factor in (("long", 8.0), ("short", 1.0)):
            writer.add_tensor(f"rope_factors_{name}.weight", np.full(config.head_dim // 2, factor, np.float32))
    _vocabulary(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[kind.upper()], config.num_hidden_layers)
    for name, tensor in weights.items():
        part = name.rsplit(".", 2)[-2]
        if kind in PERMUTED and part in ("q_proj", "k_proj"):
            n = heads if part == "q_proj" else keys
            tensor = tensor.reshape(n, 2, tensor.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target, name
        tensor = np.ascontiguousarray(tensor)
        if tensor.ndim == 2 and quantised != "F32":
            type_ = gguf.GGMLQuantizationType[quantised]
            writer.add_tensor(target, gguf.quants.quantize(tensor, type_), raw_dtype=type_)
        else:
            writer.add_tensor(target, tensor)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-*.gguf"))


def _vocabulary(writer: Any, tokenizer: Any) -> None:
    import gguf

    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    special = set(tokenizer.all_special_ids)
    types = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in inner["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}")
