"""Every kind of PEFT adapter: what is analysed is the change of the weights by PEFT's own account, or it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tiny import tiny_model, tiny_tokenizer
from zopro.analysis.analyse import analyse
from zopro.analysis.numbers.gram import gram_matrices
from zopro.analysis.reading.checkpoints import of_folder
from zopro.analysis.reading.parts import pair
from zopro.analysis.reading.streaming import Points
from zopro.errors import InputError

STEPS = 3
TOKENIZER = tiny_tokenizer()
SOME = ["q_proj", "up_proj"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {"lora_alpha": 6},
    "all-linear": {"target_modules": "all-linear"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 5},
        "alpha_pattern": {r"layers.0.self_attn.q_proj": 32, "up_proj": 5},
    },
    "patterns, rslora": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"^model.layers.1.*": 9}, "use_rslora": True},
    "bias": {"bias": "all"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "whole modules": {"modules_to_save": ["norm", "lm_head"]},
    "trained tokens": {"trainable_token_indices": [3, 5]},
    "some layers": {"layers_to_transform": [1]},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}
OTHERS: dict[str, Any] = {
    "dora": LoraConfig(r=2, target_modules=SOME, use_dora=True),
    "lora_bias": LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True),
    "adalora": peft.AdaLoraConfig(target_modules=SOME, init_r=3, target_r=2, total_step=10),
    "loha": peft.LoHaConfig(r=2, target_modules=SOME),
    "lokr": peft.LoKrConfig(r=2, target_modules=SOME),
    "ia3": peft.IA3Config(target_modules=SOME, feedforward_modules=["up_proj"]),
    "vera": peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(target_modules=["q_proj"], oft_block_size=4),
}


def model(name: str) -> Any:
    return tiny_model(
        "gpt2" if name == "gpt2" else "llama", TOKENIZER, **({"attention_bias": True} if name in BIASED else {})
    )


BIASED = ("bias", "lora_bias")


def walk(folder: Path, name: str, config: Any, seed: int) -> np.ndarray:
    """Save an adapter's random walk; the merged weights [STEPS, D] of what it changes, by PEFT."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # of both walks: initialisations that change the base must change it alike
        adapted = get_peft_model(model(name), config)
        torch.manual_seed(seed)
        rows: list[dict[str, torch.Tensor]] = []
        for step in range(STEPS):
            with torch.no_grad():
                for parameter in adapted.parameters():
                    if parameter.requires_grad:
                        parameter += 0.3 * torch.randn(parameter.shape)
            adapted.save_pretrained(folder / f"step-{step}", save_embedding_layers=False)
            adapted.merge_adapter()
            own = ("lora_", "trainable_tokens")  # of the adapter; the rest are the weights it changes
            merged = [(n, p) for n, p in adapted.named_parameters() if not any(word in n for word in own)]
            rows.append({n: p.detach().clone().double() for n, p in merged})
            adapted.unmerge_adapter()
    return np.stack([torch.cat([row[n].flatten() for n in sorted(row)]).numpy() for row in rows])


def config(name: str) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": SOME, "task_type": "CAUSAL_LM", **LORA[name]})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LORA)
def test_the_product_is_the_change_of_the_weights(name, tmp_path):
    """Inner products of all displacements, of policy and reward model, against PEFT's merged weights."""
    sides = ("policy", "reward")
    dense = [walk(tmp_path / side, name, config(name), seed) for seed, side in enumerate(sides)]
    moved = np.concatenate([rows - rows[0] for rows in dense])
    pairing = pair(*(of_folder(tmp_path / side, side) for side in sides))
    points = Points(STEPS, 2 * STEPS, tuple(range(2 * STEPS)))
    found = gram_matrices(pairing, points, 10)["product"]
    expected = moved @ moved.T
    np.testing.assert_allclose(found.total, expected, rtol=2e-4, atol=2e-4 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("named", [True, False], ids=["by its configuration", "by its tensors"])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_than_a_product_is_refused(name, named, tmp_path):
    for side in ("policy", "reward"):
        with torch.random.fork_rng(devices=[]):
            adapted = get_peft_model(model(name), OTHERS[name])
        for step in range(2):
            adapted.save_pretrained(tmp_path / side / f"step-{step}", save_embedding_layers=False)
            if not named:
                (tmp_path / side / f"step-{step}" / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="Merge each checkpoint into its base") as refused:
        analyse(*(of_folder(tmp_path / side, side) for side in ("policy", "reward")))
    assert "\n" not in str(refused.value)


def test_embeddings_beside_a_whole_model(tmp_path):
    """LoRA stores the factors of an embedding's transpose: a policy of whole weights has the same rows."""
    walk(tmp_path / "reward", "embeddings", config("embeddings"), 0)
    for step in range(STEPS):
        plain = tiny_model("llama", TOKENIZER)
        nn.init.normal_(plain.get_input_embeddings().weight, std=0.1 * (step + 1))
        plain.save_pretrained(tmp_path / "policy" / f"step-{step}")
    pairing = pair(*(of_folder(tmp_path / side, side) for side in ("policy", "reward")))
    index = [part.name for part in pairing.parts].index("model.embed_tokens.weight")
    found = gram_matrices(pairing, Points(STEPS, 2 * STEPS, tuple(range(2 * STEPS))), 10)["product"]
    files = [load_file(tmp_path / "policy" / f"step-{step}" / "model.safetensors") for step in range(STEPS)]
    policy = [file["model.embed_tokens.weight"].double() for file in files]
    reward = []
    for step in range(STEPS):
        file = load_file(tmp_path / "reward" / f"step-{step}" / "adapter_model.safetensors")
        a, b = (file[f"base_model.model.model.embed_tokens.lora_embedding_{side}"].double() for side in "AB")
        reward.append(8 / 2 * (b @ a).T)
    rows = torch.stack([(x - side[0]).flatten() for side in (policy, reward) for x in side])
    np.testing.assert_allclose(found.gram[index], (rows @ rows.T).numpy(), rtol=1e-5, atol=1e-5)
