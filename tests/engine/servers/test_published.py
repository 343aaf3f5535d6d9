"""An adapter of a GGUF file, exported: PEFT puts all of it on the model that the file was made of."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from zopro.engine.servers.llamacpp.adapter import fresh, module_names
from zopro.engine.servers.llamacpp.published import AS_LLAMA, OTHERS, by_head, publish
from zopro.weights.saving import save_tensors

gguf = pytest.importorskip("gguf", reason="knows llama.cpp's names")

SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
KEYS = {"num_key_value_heads": 2}
OWN: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 64, "vocab_size": 99},
    "gptneox": SIZES,
    "falcon": SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 64},
    **{name: SIZES | KEYS | {"head_dim": 8} for name in ("qwen3", "gemma2", "glm4")},
}
HEADS = {"gpt2": (4, 4), "gptneox": (4, 4), "falcon": (4, 2), "phi2": (4, 2)}
KINDS = {
    "llama": "llama", "qwen3": "qwen3", "phi3": "phi3", "olmo": "olmo", "cohere2": "cohere2", "gemma2": "gemma2",
    "glm4": "glm4", "starcoder2": "starcoder2", "phi2": "phi", "gptneox": "gpt_neox", "gpt2": "gpt2", "falcon": "falcon",
}  # fmt: skip
"""llama.cpp's architecture -> transformers' model type."""


def tiny(architecture: str) -> Any:
    config = AutoConfig.for_model(KINDS[architecture], **OWN.get(architecture, SIZES | KEYS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def in_the_file(model: Any, architecture: str) -> dict[str, tuple[int, ...]]:
    """llama.cpp's name of each matrix -> its shape (out, in), as the converter's own table has them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    found = {}
    for name, weight in model.named_parameters():
        target = names.get_name(name, try_suffixes=(".weight",))
        if weight.dim() == 2 and target:
            shape = tuple(weight.shape)
            found[target] = shape[::-1] if architecture == "gpt2" and target.startswith("blk.") else shape
    return found


def exported(folder: Path, model: Any, architecture: str) -> dict[str, torch.Tensor]:
    """A run's adapter on all modules, by its own names."""
    shapes = in_the_file(model, architecture)
    modules = module_names(shapes, architecture)
    tensors = fresh({name: (shapes[weight][0], shapes[weight][1]) for name, weight in modules.items()}, 2, seed=0)
    for name in tensors:
        if ".lora_B" in name:
            tensors[name].normal_(generator=torch.Generator().manual_seed(len(name)))
    save_tensors({f"base_model.model.{name}": t for name, t in tensors.items()}, folder / "adapter_model.safetensors")
    kinds = sorted({name.rpartition(".")[2] for name in modules})
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": kinds}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return tensors


@pytest.mark.parametrize("architecture", KINDS)
def test_peft_finds_every_tensor_of_it(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    tensors = exported(tmp_path, model, architecture)
    assert publish(tmp_path, architecture, HEADS.get(architecture, (4, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        policy = PeftModel.from_pretrained(model, tmp_path)
    found = {name: p for name, p in policy.named_parameters() if ".lora_" in name}
    assert len(found) == len(tensors) >= 2 * 2 * 3
    assert all(p.abs().sum() > 0 for p in found.values()), [name for name, p in found.items() if not p.abs().sum()]
    ours = sorted(t.double().square().sum().item() for t in tensors.values())
    assert sorted(p.double().square().sum().item() for p in found.values()) == pytest.approx(ours)


@pytest.mark.parametrize(("heads", "keys"), [(4, 4), (4, 2), (4, 1)])
def test_fused_rows_lie_as_before_the_converter(heads: int, keys: int) -> None:
    """Its lines for Falcon, of which GPT-NeoX is the case of as many keys as queries."""
    wide, n_embd = 8, 32
    theirs = torch.randn((heads + 2 * keys) * wide, n_embd)
    qkv = theirs.view(keys, heads // keys + 2, wide, n_embd)
    q = qkv[:, :-2].reshape(heads * wide, n_embd)
    k, v = (qkv[:, [place]].reshape(keys * wide, n_embd) for place in (-2, -1))
    assert torch.equal(by_head(torch.cat((q, k, v)), heads, keys), theirs)


def test_unknown_names_are_left_as_they_are(tmp_path: Path) -> None:
    exported(tmp_path, tiny("llama"), "llama")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not publish(tmp_path, "bloom", (4, 4)) and publish(tmp_path, "llama", (4, 2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not AS_LLAMA & OTHERS.keys()
