"""LoRA tensors as llama.cpp reads them: a GGUF file, names of its own, and rows of q and k in its rotary order.

theta keeps the names and shapes that it has in transformers and PEFT, so that journal, replay and export know nothing of
GGUF. A module's A is (r, in), its B (out, r); llama.cpp adds alpha / r B A x to the module's output.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping

import torch
from torch import Tensor

from zopro.errors import InputError

MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of a block: llama.cpp's name -> transformers'."""

FUSED = {"phi3": {"ffn_up": "mlp.gate_up_proj"}}
"""Architectures with names of their own."""

ROTATED = frozenset(("llama", "granite", "smollm3", "arcee", "minicpm"))
"""Architectures whose rows of q and k the converter reorders, since llama.cpp rotates neighbours, transformers halves."""

AS_THEY_ARE = frozenset(("qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "olmo2", "stablelm"))
"""Those whose rows it leaves in order."""

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_TENSOR = re.compile(r"(.+)\.lora_([AB])\.weight")


def module_names(tensors: Mapping[str, tuple[int, ...]], architecture: str) -> dict[str, str]:
    """transformers' name of each matrix that can carry an adapter -> llama.cpp's name of its weight.

    >>> module_names({"blk.3.attn_q.weight": (8, 8), "blk.3.attn_norm.weight": (8,)}, "llama")
    {'model.layers.3.self_attn.q_proj': 'blk.3.attn_q.weight'}
    """
    known = MODULES | FUSED.get(architecture, {})
    found = {}
    for name, shape in tensors.items():
        match = _BLOCK.fullmatch(name)
        if match and match[2] in known and len(shape) == 2:
            found[f"model.layers.{match[1]}.{known[match[2]]}"] = name
    return found


def weight_of(module: str, architecture: str) -> str:
    """llama.cpp's name of a module's weight. Raises InputError: it takes no adapter there.

    >>> weight_of("model.layers.3.self_attn.o_proj", "llama")
    'blk.3.attn_output.weight'
    """
    names = {ours: theirs for theirs, ours in (MODULES | FUSED.get(architecture, {})).items()}
    match = _LAYER.fullmatch(module)
    if match is None or match[2] not in names:
        raise InputError(
            f"lora_target_modules: must be modules inside of a block for llama.cpp, {', '.join(names)}, got {module!r}."
        )
    return f"blk.{match[1]}.{names[match[2]]}.weight"


def rotated(rows: Tensor, heads: int) -> Tensor:
    """Rows (out, r) of q or k in the order in which llama.cpp rotates them: of each head, the halves interleaved.

    >>> rotated(torch.arange(4.0)[:, None], 1).flatten().tolist()
    [0.0, 2.0, 1.0, 3.0]
    """
    out, rank = rows.shape
    return rows.reshape(heads, 2, out // heads // 2, rank).transpose(1, 2).reshape(out, rank)


def heads_of(name: str, architecture: str, heads: int, key_heads: int) -> int:
    """Heads whose rows are reordered in a weight of llama.cpp; 0 where none are.

    Raises InputError: q or k of an architecture whose order is not known.
    """
    kind = name.split(".")[2]
    if kind not in ("attn_q", "attn_k") or architecture in AS_THEY_ARE:
        return 0
    if architecture not in ROTATED:
        raise InputError(
            f"lora_target_modules: must leave out q_proj and k_proj, whose rows' order in a GGUF of the architecture "
            f"{architecture!r} is not known here. Known are {', '.join(sorted(ROTATED | AS_THEY_ARE))}."
        )
    return heads if kind == "attn_q" else key_heads


def fresh(shapes: Mapping[str, tuple[int, int]], rank: int, seed: int) -> dict[str, Tensor]:
    """A new adapter's tensors for modules of shape (out, in), by plain PEFT names: A drawn as PEFT draws it, B = 0."""
    tensors = {}
    generator = torch.Generator().manual_seed(seed)
    for module, (out, wide) in shapes.items():
        a = torch.empty(rank, wide)
        bound = 1 / math.sqrt(wide)  # kaiming_uniform_ with a = sqrt(5)
        tensors[f"{module}.lora_A.weight"] = a.uniform_(-bound, bound, generator=generator)
        tensors[f"{module}.lora_B.weight"] = torch.zeros(out, rank)
    return tensors


def parts(name: str) -> tuple[str, str]:
    """The module of an adapter's tensor, and A or B. Raises InputError: not LoRA.

    >>> parts("model.layers.0.mlp.up_proj.lora_A.weight")
    ('model.layers.0.mlp.up_proj', 'A')
    """
    match = _TENSOR.fullmatch(name)
    if match is None:
        raise InputError(f"engine: llamacpp must be given an adapter of plain LoRA, got the tensor {name!r}.")
    return match[1], match[2]


def adapter_bytes(
    tensors: Mapping[str, Tensor], architecture: str, alpha: float, weights: Mapping[str, tuple[str, int]]
) -> bytes:
    """A GGUF file of the adapter.

    Args:
        tensors: A and B by plain PEFT names.
        architecture: of the model, which llama.cpp compares with its own.
        weights: for each module llama.cpp's name, and the heads whose rows are reordered (0: none).
    """
    entries: list[tuple[str, Tensor]] = []
    for name, tensor in tensors.items():
        module, side = parts(name)
        weight, heads = weights[module]
        values = rotated(tensor, heads) if side == "B" and heads else tensor
        entries.append((f"{weight}.lora_{side.lower()}", values.detach().to("cpu", torch.float32).contiguous()))
    return _gguf(
        {"general.architecture": architecture, "general.type": "adapter", "adapter.type": "lora",
         "adapter.lora.alpha": float(alpha)},
        entries,
    )  # fmt: skip


ALIGNMENT = 32
_STRING, _FLOAT32 = 8, 6


def _gguf(values: Mapping[str, str | float], tensors: list[tuple[str, Tensor]]) -> bytes:
    """A file of GGUF version 3 (github.com/ggml-org/ggml/blob/master/docs/gguf.md) with fp32 tensors."""
    head = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(values))]
    for key, value in values.items():
        if isinstance(value, str):
            head += [_text(key), struct.pack("<I", _STRING), _text(value)]
        else:
            head += [_text(key), struct.pack("<If", _FLOAT32, value)]
    data, offset = [], 0
    for name, tensor in tensors:
        shape = tensor.shape[::-1]  # the fastest dimension first
        head.append(_text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, offset))
        raw = tensor.numpy().tobytes()
        data.append(raw + bytes(-len(raw) % ALIGNMENT))
        offset += len(data[-1])
    start = b"".join(head)
    return b"".join([start, bytes(-len(start) % ALIGNMENT), *data])


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
