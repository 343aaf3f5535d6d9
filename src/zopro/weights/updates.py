"""What an iteration changed: differences of saved policies and reward models, from their files alone.

They are what targeted directions are made of (mu and v), when a policy is trained and when its steps are replayed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from zopro.errors import InputError
from zopro.weights.adapters import adapter_state, tensor_files
from zopro.weights.names import ADAPTER_CONFIG
from zopro.weights.tensors import read_tensor


def policy_update(after: Path, before: Path, full: bool) -> Mapping[str, Tensor]:
    """mu: the difference of two saved policies: adapters, or (`full`) models, read tensor by tensor when asked for.

    Raises InputError: a folder without the files.
    """
    if full:
        return _LazyDifference(after, before)
    return difference(adapter_state(after), adapter_state(before))


def reward_update(after: Path, before: Path, full: bool, alpha: int) -> Mapping[str, Tensor]:
    """v: the difference of two saved reward models, of the tensors they share with the policy.

    Against a policy that is a whole model (`full`) the adapter counts as the product it adds to the weights, with the
    scale `alpha` / rank. Raises InputError: a folder without the files.
    """
    new, old = adapter_state(after), adapter_state(before)
    if full:
        return _ProductDifference(new, old, alpha, transposed=_stored_transposed(after))
    return difference(new, old)


def _stored_transposed(folder: Path) -> bool:
    """Whether an adapter is of layers whose weights are (in, out), as GPT-2's Conv1D has them."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return False
    try:
        return bool(json.loads(path.read_text("utf-8")).get("fan_in_fan_out"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"'{path}': must be an adapter's configuration, and cannot be read ({error}). Restore it."
        ) from None


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

    def __init__(
        self, after: Mapping[str, Tensor], before: Mapping[str, Tensor], alpha: int, transposed: bool = False
    ) -> None:
        self._after, self._before, self._alpha, self._transposed = after, before, alpha, transposed
        self._names = [n.replace("lora_A.weight", "weight") for n in after if n.endswith("lora_A.weight") and n in before]

    def __getitem__(self, name: str) -> Tensor:
        factor_a, factor_b = (name.removesuffix("weight") + f"lora_{side}.weight" for side in "AB")
        scale = self._alpha / self._after[factor_a].shape[0]
        after = self._after[factor_b].float() @ self._after[factor_a].float()
        product = scale * (after - self._before[factor_b].float() @ self._before[factor_a].float())
        return product.T.contiguous() if self._transposed else product

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
