"""What a direction is, and what the directions draw from and measure with."""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


def tensor_generator(name: str, seed: int, step: int, device: torch.device) -> torch.Generator:
    """A fresh generator for one tensor at one step; its seed is the first 8 bytes of BLAKE2b(seed / step / name)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def gaussian(name: str, like: Tensor, seed: int, step: int) -> Tensor:
    """n ~ N(0, I) of the shape of `like`, fp32."""
    generator = tensor_generator(name, seed, step, like.device)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


class Directions(ABC):
    """A source of directions. Subclasses say what z is for one tensor; everything else follows.

    Attributes:
        pure: the same arguments give the same z for as long as a step lasts, so that it may be kept and not drawn again.
    """

    pure = True

    @abstractmethod
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        """Return z for the parameter `name`: fp32, of the shape and on the device of `like`, a new tensor each time."""

    def tensors(self, named: Sequence[tuple[str, Tensor]], seed: int, step: int) -> list[Tensor]:
        """z of each parameter, as `tensor` gives it up to rounding: on a GPU in fewer kernels for all of them."""
        return [self.tensor(name, like, seed, step) for name, like in named]

    def factors(self, name: str, like: Tensor, seed: int, step: int) -> tuple[Tensor, Tensor] | None:
        """A (m, r) and B (n, r) of which z = A B^T, if it is made of such; None where it is not."""
        return None

    def sample(self, named_params: Iterable[tuple[str, Tensor]], seed: int, step: int) -> dict[str, Tensor]:
        """Return {name: z} for all of `named_params`: same arguments, same z. SPSA draws one tensor at a time."""
        named = dict(named_params)
        self.check(named.items())
        return {name: self.tensor(name, like, seed, step) for name, like in named.items()}

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:  # noqa: B027  (most have nothing to check)
        """Raise ValueError if these parameters cannot be given a direction. Called once by SPSA."""


def norm_of(tensor: Tensor) -> float:
    """Euclidean norm, taken in units of the largest entry: squares of very small or large numbers leave fp32."""
    if not tensor.numel():
        return 0.0
    wide = tensor.float()
    largest = float(torch.linalg.vector_norm(wide, ord=torch.inf))
    return largest * float(torch.linalg.vector_norm(wide / largest)) if 0 < largest < math.inf else largest


def check_update(label: str, update: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError for an update of other parameters than those of `shapes`, or in other shapes."""
    shared = [name for name in update if name in shapes]
    if len(update) and not shared:
        raise ValueError(
            f"{label}: must name parameters of the policy such as {next(iter(shapes), None)!r}, "
            f"got names such as {next(iter(update))!r}"
        )
    for name in shared:
        if tuple(update[name].shape) != shapes[name]:
            raise ValueError(
                f"{label}: {name!r} must have its parameter's shape {shapes[name]}, got {tuple(update[name].shape)}"
            )


def warn_of_missing(label: str, update: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Say where an update lacks parameters that are trained: along these there is noise alone."""
    missing = [name for name in shapes if name not in update]
    if len(update) and missing:
        share = sum(map(math.prod, map(shapes.__getitem__, missing))) / sum(map(math.prod, shapes.values()))
        logger.warning(
            "%s: lacks %d of %d tensors (%.0f %% of what is trained), such as %s: these move along noise alone.",
            label, len(missing), len(shapes), 100 * share, missing[0],
        )  # fmt: skip


def norms(label: str, update: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms of the tensors that are not 0. Raises ValueError for NaN or infinity."""
    norms = {name: norm_of(update[name]) for name in update}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise ValueError(f"{label}: must be finite, got NaN or infinity in {name!r}")
    return {name: norm for name, norm in norms.items() if norm > 0}
