"""Random trajectories on disk, with the same trajectories as dense arrays: what every metric is checked against."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from zopro.analysis.analyse import analyse
from zopro.analysis.reading.checkpoints import of_folder

MODULES = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")


@dataclass
class Walk:
    """A folder of checkpoints; `factors` and `product` are [checkpoints, D], `product` is scale * B A."""

    folder: Path
    factors: np.ndarray
    product: np.ndarray


def lora_walk(
    folder: Path,
    steps: int = 4,
    seed: int = 0,
    rank: int = 3,
    layers: int = 3,
    alpha: float = 6.0,
    size: tuple[int, int] = (14, 10),
    extra: dict[str, torch.Tensor] | None = None,
    ema: float = 1.0,
) -> Walk:
    """A random walk of LoRA adapters as PEFT saves them: checkpoint-0, checkpoint-5, checkpoint-10 ...

    ema: what is saved are moving averages of the walk's factors, with this weight of the newest.
    """
    generator = torch.Generator().manual_seed(seed)
    names = [f"base_model.model.model.layers.{layer}.{module}" for layer in range(layers) for module in MODULES]
    out, width = size
    a = torch.randn(len(names), rank, width, generator=generator)
    b = torch.zeros(len(names), out, rank)
    factors, product, averages = [], [], (b.double(), a.double())
    for step in range(steps + 1):
        place = folder / f"checkpoint-{5 * step}"
        tensors = {}
        averages = tuple(ema * new.double() + (1 - ema) * old for new, old in zip((b, a), averages, strict=True))
        saved = averages if ema < 1 else (b, a)
        for name, left, right in zip(names, *saved, strict=True):
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = right.clone(), left.clone()
        write(place, tensors | (extra or {}), {"lora_alpha": alpha, "r": rank})
        factors.append(torch.cat([torch.cat([x.flatten(), y.flatten()]) for x, y in zip(a, b, strict=True)]).double())
        product.append((alpha / rank * b.double() @ a.double()).flatten())
        a = a + 0.2 * torch.randn(a.shape, generator=generator)
        b = b + 0.2 * torch.randn(b.shape, generator=generator)
    return Walk(folder, torch.stack(factors).numpy(), torch.stack(product).numpy())


def dense_walk(folder: Path, points: np.ndarray, dtype: torch.dtype = torch.float64) -> Walk:
    """Whole models of two tensors in three layers whose flattened weights are the rows of `points` [T, D]."""
    for step, point in enumerate(points):
        tensors = {
            f"model.layers.{layer}.mlp.{name}.weight": torch.from_numpy(piece.copy()).to(dtype)
            for layer, half in enumerate(np.array_split(point, 3))
            for name, piece in zip(("down_proj", "up_proj"), np.array_split(half, 2), strict=True)
        }
        place = folder / f"step{step}"
        place.mkdir(parents=True)
        save_file(tensors, place / "model.safetensors")
    return Walk(folder, points, points)


def write(place: Path, tensors: dict[str, torch.Tensor], config: dict | None = None) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    save_file(tensors, place / "adapter_model.safetensors")
    if config is not None:
        (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of rows."""
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(cosines(a, b), -1, 1)))


def analysed(policy: Walk, reward: Walk, **options: Any) -> dict[str, Any]:
    return analyse(of_folder(policy.folder, "policy"), of_folder(reward.folder, "reward"), **options)


def defined_dcor(a: np.ndarray, b: np.ndarray) -> float:
    """Distance correlation by its definition, from whole matrices."""
    centred = []
    for points in (a, b):
        far = np.abs(points[:, None] - points)
        centred.append(far - far.mean(0) - far.mean(1, keepdims=True) + far.mean())
    both, first, second = (np.mean(x * y) for x, y in ((centred[0], centred[1]), [centred[0]] * 2, [centred[1]] * 2))
    return float(np.sqrt(both / np.sqrt(first * second)))
