"""Where a zeroth-order step looks: z as a pure function of (parameter name, shape, seed, step).

Every tensor draws from a generator of its own, seeded by a hash of the seed, the step and the tensor's name. So a
direction can be replayed from a few bytes, is equal on every rank, does not depend on the order of the parameters or on
the global random state, and no two tensors share noise (with `Signs`, no two sub-layers). CPU and CUDA generators
differ: replay on the same kind of device.

`Targeted` is the paper's direction (Galatolo et al. 2025, arXiv 2503.03460): the policy's previous update
plus noise orthogonal to the reward model's update. Beyond the paper it handles v = 0 and mu = 0, and can normalise its
scale (`normalize=True`) so that the learning rate does not silently scale with |mu|^2.

    python -c "import torch, zopro; print(zopro.Gaussian().sample([('w', torch.zeros(2))], seed=0, step=3))"
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from zopro.zo.schedules import target_share

ROUNDING = 1e-6  # root mean square of noise below which projections have left nothing of it


def tensor_generator(name: str, seed: int, step: int, device: torch.device) -> torch.Generator:
    """A fresh generator for one tensor at one step; its seed is the first 8 bytes of BLAKE2b(seed / step / name)."""
    digest = hashlib.blake2b(f"{seed}/{step}/{name}".encode(), digest_size=8).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest, "little") >> 1)


def _gaussian(name: str, like: Tensor, seed: int, step: int) -> Tensor:
    generator = tensor_generator(name, seed, step, like.device)
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=torch.float32)


class Directions(ABC):
    """A source of directions. Subclasses say what z is for one tensor; everything else follows."""

    @abstractmethod
    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        """Return z for the parameter `name`: fp32, of the shape and on the device of `like`, a new tensor each time."""

    def sample(self, named_params: Iterable[tuple[str, Tensor]], seed: int, step: int) -> dict[str, Tensor]:
        """Return {name: z} for all of `named_params`: same arguments, same z. SPSA draws one tensor at a time."""
        named = dict(named_params)
        self.check(named.items())
        return {name: self.tensor(name, like, seed, step) for name, like in named.items()}

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:  # noqa: B027  (most have nothing to check)
        """Raise ValueError if these parameters cannot be given a direction. Called once by SPSA."""


class Gaussian(Directions):
    """z ~ N(0, I): SPSA as in MeZO (Malladi et al. 2023, arXiv 2305.17333).

    >>> round(float(Gaussian().sample([("w", torch.zeros(100, 100))], seed=0, step=3)["w"].std()), 1)
    1.0
    """

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return _gaussian(name, like, seed, step)


class Rademacher(Directions):
    """z uniform on {-1, +1}^d: Spall's original choice (1992). One random byte gives eight entries, which makes it the
    cheap choice where noise is drawn for every parameter of a model.

    >>> Rademacher().sample([("w", torch.zeros(100))], seed=0, step=3)["w"].unique()
    tensor([-1.,  1.])
    """

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        generator = tensor_generator(name, seed, step, like.device)
        count = like.numel()
        packed = torch.empty((count + 7) // 8, dtype=torch.uint8, device=like.device).random_(generator=generator)
        bits = torch.arange(256, device=like.device)[:, None] >> torch.arange(8, device=like.device) & 1
        signs = torch.nn.functional.embedding(packed.int(), bits.float().mul_(2).sub_(1))  # (count / 8, 8)
        return signs.flatten()[:count].view(like.shape)


class LowRank(Directions):
    """z = A B^T / sqrt(r) for a matrix (m, n), with A (m, r), B (n, r) ~ N(0, I): E[z z^T] = I from r (m + n) draws.

    The cheapest choice where noise is drawn for every parameter of a model (LOZO, Chen et al. 2024, arXiv 2410.07698).
    Tensors of more dimensions are matrices of their first dimension; vectors, which have no rank, take N(0, I).

    Args:
        rank: r. Entries have kurtosis 3 + 6 / r: the larger, the nearer to Gaussian noise.

    Raises:
        ValueError: rank < 1.

    >>> int(torch.linalg.matrix_rank(LowRank(rank=2).sample([("w", torch.zeros(8, 6))], seed=0, step=3)["w"]))
    2
    """

    def __init__(self, rank: int = 4) -> None:
        if rank < 1:
            raise ValueError(f"rank: must be at least 1, got {rank}")
        self.rank = rank

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        if like.dim() < 2:
            return _gaussian(name, like, seed, step)
        rows, columns = len(like), like[0].numel() if len(like) else 0
        factors = _gaussian(name, like.new_empty(rows + columns, self.rank, device=like.device), seed, step)
        return (factors[:rows] @ factors[rows:].div_(math.sqrt(self.rank)).T).view(like.shape)


def sublayer(name: str) -> str:
    """The part of the network that a parameter belongs to: its name up to the component after the first number.

    That is a block's attention or its MLP; a parameter outside of the blocks is a part of its own.

    >>> sublayer("model.layers.3.mlp.down_proj.lora_A.weight")
    'model.layers.3.mlp'
    >>> sublayer("lm_head.weight")
    'lm_head.weight'
    """
    components = name.split(".")
    number = next((i for i, component in enumerate(components) if component.isdecimal()), len(components))
    return ".".join(components[: number + 2])


class Signs(Directions):
    """z = s mu sqrt(n) / |mu| for each tensor of n entries: its part of an earlier update, with a random sign s for
    each sub-layer.

    SPSA with Rademacher signs in the subspace that has one coordinate a sub-layer, some tens where a model has millions
    of entries: steps find out which sub-layers should go on along the update and which should go back. (Ours.)

    Args:
        update: name -> mu. A tensor without one (missing or 0) draws N(0, I). May be a lazy mapping.

    Raises:
        ValueError: a non-finite update.

    >>> Signs({"w": torch.tensor([3.0, 3.0])}).sample([("w", torch.zeros(2))], seed=0, step=3)["w"].abs()
    tensor([1., 1.])
    """

    def __init__(self, update: Mapping[str, Tensor]) -> None:
        self.update = update
        self._norms = _norms("update", update)

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        norm = self._norms.get(name)
        if norm is None:
            return _gaussian(name, like, seed, step)
        generator = tensor_generator(sublayer(name), seed, step, torch.device("cpu"))
        sign = 1 - 2 * int(torch.randint(2, (), generator=generator))
        mu = self.update[name].to(device=like.device, dtype=torch.float32)
        return mu * (sign * math.sqrt(mu.numel()) / norm)


NOISES: dict[str, Callable[[], Directions]] = {"gaussian": Gaussian, "rademacher": Rademacher, "low_rank": LowRank}
"""Directions without a preference, by the name that options give them."""

NOISE_KINDS = ("signs", *NOISES)
"""What `noise_source` makes."""


def noise_source(kind: str, update: Mapping[str, Tensor]) -> Directions:
    """What n is drawn from: one of `NOISES`, or `Signs` of `update` ("signs"); of an empty update, `Gaussian`."""
    if kind == "signs":
        return Signs(update) if len(update) else Gaussian()
    return NOISES[kind]()


class Targeted(Directions):
    """ZOPrO's direction: z = d mu + sqrt(1 - d^2) n_perp, per parameter tensor (the paper).

    mu is the policy's update over the previous iteration, v the reward model's update over the same one, and

        n ~ N(0, I);   n_perp = n - <v^, n> v^;   n_perp <- n_perp |mu| / |n_perp|.

    d is `target_share(step, total_steps, decay)`. Tensors without a reward update (v missing or 0) keep n as it is.
    Tensors without a previous update (mu missing or 0) would never move: they take n_perp alone, at the mean of the
    others' root mean squares, or unscaled if there are no others. (A one-element tensor has no noise orthogonal to its
    reward update, and moves along mu only; so does one whose noise is parallel to it, which `Signs` can be.)

    Args:
        previous_update: name -> mu; shapes of the parameters. May be a lazy mapping.
        reward_update: name -> v; may lack tensors (a policy's head has no counterpart), may be empty.
        total_steps: steps of this iteration, N.
        decay: "linear" (0 at step N - 1) or "exponential".
        normalize: scale all of z by one factor so that mu has root mean square 1, which gives `lr` and `eps` the
            meaning they have for Gaussian directions. False keeps the paper's scale.
        noise: where n is drawn from, with entries of root mean square 1; by default `Gaussian()`, as in the paper.

    Raises:
        ValueError: total_steps < 1, an unknown decay, a non-finite update, or (from `check`) an update whose shape
            differs from its parameter's, or one that is not empty but names none of the parameters.

    >>> mu, v = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([0.0, 2.0])}
    >>> z = Targeted(mu, v, total_steps=10, normalize=False)
    >>> z.sample([("w", torch.zeros(2))], seed=0, step=9)["w"].abs()  # d is 0: orthogonal to v, as long as mu
    tensor([5., 0.])
    """

    def __init__(
        self,
        previous_update: Mapping[str, Tensor],
        reward_update: Mapping[str, Tensor],
        total_steps: int,
        decay: str = "linear",
        normalize: bool = True,
        noise: Directions | None = None,
    ) -> None:
        target_share(0, total_steps, decay)
        self.previous_update = previous_update
        self.reward_update = reward_update
        self.total_steps = total_steps
        self.decay = decay
        self.normalize = normalize
        self.noise = noise or Gaussian()
        self._norms = _norms("previous_update", previous_update)
        self._reward_norms = _norms("reward_update", reward_update)
        elements = {name: previous_update[name].numel() for name in self._norms}
        total = math.sqrt(sum(norm**2 for norm in self._norms.values()))
        self._scale = math.sqrt(sum(elements.values())) / total if normalize and total > 0 else 1.0
        sizes = [norm / math.sqrt(elements[name]) for name, norm in self._norms.items()]  # root mean squares
        self._mean_size = sum(sizes) / len(sizes) if sizes else None

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in named_params}
        for label, update in (("previous_update", self.previous_update), ("reward_update", self.reward_update)):
            shared = [name for name in update if name in shapes]
            if len(update) and not shared:
                raise ValueError(
                    f"{label}: must name parameters of the policy such as {next(iter(shapes), None)!r}, "
                    f"got names such as {next(iter(update))!r}"
                )
            for name in shared:
                if tuple(update[name].shape) != shapes[name]:
                    raise ValueError(
                        f"{label}: {name!r} must have its parameter's shape {shapes[name]}, "
                        f"got {tuple(update[name].shape)}"
                    )

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        noise = self._orthogonal_noise(name, like, seed, step)
        mu_norm = self._norms.get(name)
        if mu_norm is None:
            wanted = None if self._mean_size is None else self._mean_size * math.sqrt(noise.numel()) * self._scale
            return noise if wanted is None else _rescaled(noise, wanted)
        d = target_share(step, self.total_steps, self.decay)
        mu = self.previous_update[name].to(device=like.device, dtype=torch.float32)
        noise = _rescaled(noise, mu_norm)
        return noise.mul_(math.sqrt(1 - d * d)).add_(mu, alpha=d).mul_(self._scale)

    def _orthogonal_noise(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        """n - <v^, n> v^."""
        noise = self.noise.tensor(name, like, seed, step)
        norm = self._reward_norms.get(name)
        if norm is None:
            return noise
        unit = self.reward_update[name].to(device=like.device, dtype=torch.float32) / norm
        return orthogonal_(noise, unit)


def orthogonal_(tensor: Tensor, unit: Tensor) -> Tensor:
    """Take the component along `unit`, of norm 1, off `tensor` in place.

    Twice: once leaves rounding of the order of |tensor| where the two are nearly parallel. A one-element tensor has no
    direction orthogonal to another; what is left there is rounding, and is set to 0.
    """
    for _ in range(2):
        tensor.sub_(unit * (unit * tensor).sum())
    return tensor.zero_() if tensor.numel() == 1 else tensor


def norm_of(tensor: Tensor) -> float:
    """Euclidean norm, taken in units of the largest entry: squares of very small or large numbers leave fp32."""
    wide = tensor.float()
    largest = float(torch.linalg.vector_norm(wide, ord=torch.inf))
    return largest * float(torch.linalg.vector_norm(wide / largest)) if 0 < largest < math.inf else largest


def _norms(label: str, update: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms of the tensors that are not 0. Raises ValueError for NaN or infinity."""
    norms = {name: norm_of(update[name]) for name in update}
    for name, norm in norms.items():
        if not math.isfinite(norm):
            raise ValueError(f"{label}: must be finite, got NaN or infinity in {name!r}")
    return {name: norm for name, norm in norms.items() if norm > 0}


def _rescaled(noise: Tensor, norm: float) -> Tensor:
    """`noise`, drawn with root mean square 1, scaled to the given norm in place; what is but rounding becomes 0."""
    current = norm_of(noise)
    return noise.mul_(norm / current) if current > ROUNDING * math.sqrt(noise.numel()) else noise.zero_()
