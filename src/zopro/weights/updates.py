"""What an iteration changed: differences of saved policies and reward models, from their files alone.

They are what targeted directions are made of (mu and v), when a policy is trained and when its steps are replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.weights.adapters import ADAPTER_FILE, adapter_state


def policy_update(config: RunConfig, after: Path, before: Path | None) -> Mapping[str, Tensor]:
    """mu: the difference of two saved policies; in full-parameter mode read tensor by tensor when asked for.

    `before` None is the base model of a full-parameter run. Raises InputError: a folder without the files.
    """
    if config.lora_r == 0:
        return _LazyDifference(after, Path(config.model) if before is None else before)
    if before is None:
        raise InputError("before: must be a saved adapter, got None.")
    return difference(adapter_state(after), adapter_state(before))


def reward_update(config: RunConfig, after: Path, before: Path) -> Mapping[str, Tensor]:
    """v: the difference of two saved reward models, of the tensors they share with the policy.

    Against a full-parameter policy the reward model's adapter counts as the product it adds to the weights.
    Raises InputError: a folder without the files.
    """
    new, old = adapter_state(after), adapter_state(before)
    if config.lora_r == 0:
        return _ProductDifference(new, old, config.lora_alpha)
    return difference(new, old)


def difference(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """after - before in fp32, of the tensors in both.

    >>> import torch
    >>> difference({"w": torch.ones(2), "head": torch.ones(1)}, {"w": torch.zeros(2)})
    {'w': tensor([1., 1.])}
    """
    return {name: after[name].float() - before[name].float() for name in after if name in before}


class _LazyDifference(Mapping[str, Tensor]):
    """Tensor by tensor difference of two model folders, never in memory as a whole."""

    def __init__(self, after: Path, before: Path) -> None:
        self._after, self._before = tensor_files(after), tensor_files(before)
        self._names = [name for name in self._after if name in self._before]
        if not self._names:
            raise InputError(f"{before}: must hold the weights that '{after}' holds, got none of them.")

    def __getitem__(self, name: str) -> Tensor:
        return read_tensor(self._after[name], name).float() - read_tensor(self._before[name], name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _ProductDifference(Mapping[str, Tensor]):
    """scale (B1 A1 - B0 A0) of two adapters, by the name of the weight it is added to, formed when asked for."""

    def __init__(self, after: Mapping[str, Tensor], before: Mapping[str, Tensor], alpha: int) -> None:
        self._after, self._before, self._alpha = after, before, alpha
        self._names = [n.replace("lora_A.weight", "weight") for n in after if n.endswith("lora_A.weight") and n in before]

    def __getitem__(self, name: str) -> Tensor:
        factor_a, factor_b = (name.removesuffix("weight") + f"lora_{side}.weight" for side in "AB")
        scale = self._alpha / self._after[factor_a].shape[0]
        after = self._after[factor_b].float() @ self._after[factor_a].float()
        return scale * (after - self._before[factor_b].float() @ self._before[factor_a].float())

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a saved adapter or model holds each tensor. Raises InputError: no such file, or a damaged one."""
    files = [folder / ADAPTER_FILE] if (folder / ADAPTER_FILE).is_file() else []
    files = files or sorted(folder.glob("model*.safetensors"))
    if not files:
        raise InputError(f"{folder}: must hold {ADAPTER_FILE} or model*.safetensors files, got none.")
    return {name: file for file in files for name in _names(file)}


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as stream:
            return list(stream.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: must be a whole safetensors file, got a damaged one ({error}).") from None


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, on the CPU."""
    with safe_open(file, framework="pt") as stream:
        return stream.get_tensor(name)
