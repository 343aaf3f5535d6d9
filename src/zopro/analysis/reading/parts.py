"""Which tensors of two trajectories belong together: one `Part` for each weight that both of them change.

With LoRA a weight's change is stored as two factors, B [out, r] and A [r, in]. The factors view concatenates them (what
the optimiser moves; the published way); the product view is scale * B A (what the model feels).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from zopro.analysis.reading.checkpoints import AdapterOptions, Trajectory
from zopro.errors import InputError
from zopro.weights.tensors import Stored

FACTORS, PRODUCT = "factors", "product"
_SIDES = {"lora_A.weight": "lora_B.weight", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class Factors:
    """A LoRA pair of one checkpoint; the weight's change is scale * B A, transposed where the base stores [in, out]."""

    a: Stored  # [r, in]
    b: Stored  # [out, r]
    scale: float
    transposed: bool = False

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def size(self) -> tuple[int, int]:
        """(out, in)"""
        return self.b.shape[0], self.a.width


@dataclass(frozen=True)
class Part:
    """One weight: what each checkpoint of the policy, then of the reward model, holds of it."""

    name: str
    rows: tuple[Stored | Factors, ...]

    @property
    def numel(self) -> int:
        """Coordinates of the weight itself."""
        first = self.rows[0]
        return first.numel if isinstance(first, Stored) else first.size[0] * first.size[1]

    @property
    def stored_numel(self) -> int:
        """Coordinates of what is stored: of both factors with LoRA."""
        first = self.rows[0]
        return first.numel if isinstance(first, Stored) else first.a.numel + first.b.numel

    @property
    def layer(self) -> str:
        """`layer 3` for a tensor of the fourth block, `other` outside of the blocks.

        >>> Part("model.layers.3.mlp.up_proj", ()).layer
        'layer 3'
        """
        found = re.search(r"(?:^|\.)(\d+)\.", self.name)
        return f"layer {found.group(1)}" if found else "other"

    @property
    def module(self) -> str:
        """The module's own name, such as `up_proj`."""
        words = self.name.removesuffix(".weight").removesuffix(".bias").split(".")
        return words[-1]


@dataclass(frozen=True)
class Pairing:
    """All parts of two trajectories, and the tensors of one that the other lacks."""

    parts: tuple[Part, ...]
    views: tuple[str, ...]
    left_out: dict[str, list[str]]


def pair(policy: Trajectory, reward: Trajectory) -> Pairing:
    """Match the tensors of both trajectories by name; the policy's alone where there is no other.

    Raises:
        InputError: they have no weight in common, or one in different sizes.
    """
    sides = (policy, reward) if reward.checkpoints else (policy,)
    weights = [[_weights(c.tensors, c.options) for c in side.checkpoints] for side in sides]
    names = [dict.fromkeys(rows[0]) for rows in weights]
    common = [name for name in names[0] if all(name in other for other in names)]
    if not common:
        raise InputError(
            f"{_file(reward)}: must have weights in common with {_file(policy)}, got none of the same name "
            f"('{next(iter(names[1]))}' here, '{next(iter(names[0]))}' there)."
        )
    parts = tuple(Part(name, tuple(row[name] for rows in weights for row in rows)) for name in common)
    for part in parts:
        _check(part)
    left_out = {
        side.name: sorted(name for name in own if name not in other)
        for side, own, other in zip(sides, names, names[::-1], strict=True)
    }
    lora = policy.adapter and reward.adapter
    same = all(_stored_alike(part) for part in parts)
    views = (FACTORS, PRODUCT) if lora and same else (PRODUCT,)
    return Pairing(parts, views, {name: lacking for name, lacking in left_out.items() if lacking})


def _weights(tensors: Mapping[str, Stored], options: AdapterOptions | None) -> dict[str, Stored | Factors]:
    settings = options or AdapterOptions()
    found: dict[str, Stored | Factors] = {}
    for name, stored in tensors.items():
        side = next((side for side in _SIDES if name.endswith(f".{side}")), None)
        if side is None:
            if not any(name.endswith(f".{other}") for other in _SIDES.values()):
                found[name] = stored
            continue
        module = name.removesuffix(f".{side}")
        other = tensors.get(f"{module}.{_SIDES[side]}")
        if other is None:
            raise InputError(f"{stored.path}: must hold both LoRA factors, but '{module}.{_SIDES[side]}' is not there.")
        if other.width != stored.shape[0]:
            raise InputError(
                f"{stored.path}: '{module}' must have LoRA factors of one rank, got {stored.shape} and {other.shape}."
            )
        scale = settings.scale(module, stored.shape[0])
        embedding = side == "lora_embedding_A"  # whose weight is [tokens, width], stored as its transpose's factors
        found[f"{module}.weight"] = Factors(stored, other, scale, settings.transposed or embedding)
    return found


def _check(part: Part) -> None:
    """All rows of a part must be the same weight: (out, in), or the same shape where it is stored as it is."""
    first = part.rows[0]
    for row in part.rows[1:]:
        if _size(row) != _size(first):
            raise InputError(
                f"{_path(row)}: '{part.name}' must have the size {_size(first)} as in {_path(first)}, got {_size(row)}."
            )
    pairs = [row for row in part.rows if isinstance(row, Factors)]
    for row in pairs:
        if row.transposed != pairs[0].transposed:  # which square weights do not show
            raise InputError(
                f"{row.a.path}: '{part.name}' must have the fan_in_fan_out of {pairs[0].a.path}, got the other. Restore "
                "adapter_config.json."
            )


def _size(row: Stored | Factors) -> tuple[int, ...]:
    if isinstance(row, Stored):
        return row.shape
    return row.size[::-1] if row.transposed else row.size


def _stored_alike(part: Part) -> bool:
    kinds = {(row.a.shape, row.b.shape) if isinstance(row, Factors) else row.shape for row in part.rows}
    return len(kinds) == 1


def _path(row: Stored | Factors) -> object:
    return row.path if isinstance(row, Stored) else row.a.path


def _file(trajectory: Trajectory) -> object:
    return next(iter(trajectory.tensors.values())).path
