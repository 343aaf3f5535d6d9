"""A saved PEFT adapter as one GGUF file, for `llama-cli --lora` and Ollama.

gguf_adapter(Path("exported"), "llama", heads=(9, 3))      # bytes
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key

from zopro.engine.servers.llamacpp.adapter import adapter_bytes, heads_of, parts, weight_of
from zopro.errors import InputError
from zopro.weights.adapters import adapter_state
from zopro.weights.names import ADAPTER_CONFIG

ARCHITECTURES = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "stablelm", "granite")},
    **{"mistral": "llama", "gemma3_text": "gemma3", "smollm3": "smollm3", "arcee": "arcee"},
}
"""transformers' model type -> llama.cpp's architecture, of those whose names and order of rows are known."""


def gguf_adapter(folder: Path, architecture: str, heads: tuple[int, int]) -> bytes:
    """The adapter in `folder`. Its scale is in B, so that modules may have scales of their own.

    Args:
        architecture: as llama.cpp names it.
        heads: of queries and of keys.

    Raises InputError: it is more than LoRA, or on modules that llama.cpp takes no adapter on.
    """
    settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    tensors, weights = adapter_state(folder), {}
    for name, tensor in tensors.items():
        module, side = parts(name)
        weight = weight_of(module, architecture)
        weights[module] = weight, heads_of(weight, architecture, *heads)
        if side == "B":
            tensors[name] = _scale(settings, module, tensor.shape[1]) * tensor.float()
    return adapter_bytes(tensors, architecture, 0.0, weights)


def of_transformers(config: Any) -> tuple[str, tuple[int, int]]:
    """Architecture and heads of a model's configuration. Raises InputError: llama.cpp's names of it are not known."""
    text = config.get_text_config()
    architecture = ARCHITECTURES.get(text.model_type)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise InputError(
            f"--gguf: must be of one of the model types {known}, got {text.model_type!r}. Use convert_lora_to_gguf.py of "
            "llama.cpp on the PEFT adapter."
        )
    return architecture, (text.num_attention_heads, getattr(text, "num_key_value_heads", text.num_attention_heads))


def _scale(settings: dict[str, Any], module: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(patterns, module), settings["lora_alpha"]))
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
