"""An adapter of a GGUF file as PEFT puts it on the model that the file was made of, by that model's own names.

In a run its modules are called as in Llama's family, whatever the file (`adapter.module_names`), and directions are
drawn by these names. Most models have them; for others they are translated when a policy is exported.

if not publish(Path("exported"), "glm4", heads=(32, 2)): ...     # it is for llama.cpp alone
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from zopro.engine.servers.llamacpp.adapter import AS_THEY_ARE, ROTATED
from zopro.weights.adapters import adapter_tensors
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE
from zopro.weights.saving import save_tensors


class Names(NamedTuple):
    """What a family calls its blocks, and its modules where they are not called as Llama's.

    by_head: rows of the fused q, k and v are told apart by head in transformers, and by kind in the file.
    transposed: its layers hold their weights as (in, out).
    """

    blocks: str
    modules: dict[str, str]
    by_head: bool = False
    transposed: bool = False


_QKV, _O, _UP, _DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"

_BLOOMS = {
    **{_QKV: "self_attention.query_key_value", _O: "self_attention.dense"},
    **{_UP: "mlp.dense_h_to_4h", _DOWN: "mlp.dense_4h_to_h"},
}

AS_LLAMA = frozenset(
    (
        *(ROTATED | AS_THEY_ARE),
        *("olmo", "cohere2", "command-r", "exaone4", "ernie4_5", "seed_oss", "apertus", "mistral3"),
        *("qwen2moe", "qwen3moe", "olmoe", "phimoe", "granitemoe", "glm4moe"),
    )
)
"""Architectures of llama.cpp whose modules have Llama's names in transformers (phi3: and its own fused ones)."""

OTHERS = {
    "glm4": Names("model.layers", {_UP: "mlp.gate_up_proj"}),
    "starcoder2": Names("model.layers", {_UP: "mlp.c_fc", _DOWN: "mlp.c_proj"}),
    "phi2": Names("model.layers", {_O: "self_attn.dense", _UP: "mlp.fc1", _DOWN: "mlp.fc2"}),
    "gpt2": Names(
        "transformer.h", {_QKV: "attn.c_attn", _O: "attn.c_proj", _UP: "mlp.c_fc", _DOWN: "mlp.c_proj"}, transposed=True
    ),
    "gptneox": Names(
        "gpt_neox.layers", _BLOOMS | {_QKV: "attention.query_key_value", _O: "attention.dense"}, by_head=True
    ),
    "falcon": Names("transformer.h", _BLOOMS, by_head=True),
}
"""Those whose modules have other ones, as llama.cpp's converter maps them."""

_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_([AB])\.weight")


def publish(folder: Path, architecture: str, heads: tuple[int, int]) -> bool:
    """Give the adapter in `folder` the names that its model has in transformers; False: they are not known.

    Args:
        architecture: as llama.cpp names it.
        heads: of queries and of keys.
    """
    if architecture in AS_LLAMA:
        return True
    family = OTHERS.get(architecture)
    if family is None:
        return False
    renamed, targets = {}, set()
    for name, tensor in adapter_tensors(folder).items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            return False
        block, module, side = match.groups()
        theirs = family.modules.get(module, module)
        targets.add(theirs)
        mixed = family.by_head and module == _QKV and side == "B"
        renamed[f"base_model.model.{family.blocks}.{block}.{theirs}.lora_{side}.weight"] = (
            by_head(tensor, *heads) if mixed else tensor
        )
    settings = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
    settings |= {"target_modules": sorted(targets), "fan_in_fan_out": family.transposed}
    save_tensors(renamed, folder / ADAPTER_FILE)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")
    return True


def by_head(rows: Tensor, heads: int, key_heads: int) -> Tensor:
    """Rows (out, r) of q, then k, then v, as (key heads, their queries' heads + 2): the order of GPT-NeoX and Falcon.

    >>> by_head(torch.arange(6.0)[:, None], 2, 2).flatten().tolist()       # q0 q1 k0 k1 v0 v1
    [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]
    """
    rank, wide = rows.shape[1], len(rows) // (heads + 2 * key_heads)
    split = rows.split([heads * wide, key_heads * wide, key_heads * wide])
    return torch.cat([part.reshape(key_heads, -1, wide, rank) for part in split], 1).reshape(-1, rank)
