"""ZOPrO's direction: the previous update and noise orthogonal to the reward model's."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from zopro.zo.directions import there
from zopro.zo.directions.base import Directions, check_update, norm_of, norms, warn_of_missing
from zopro.zo.directions.gaussian import Gaussian
from zopro.zo.directions.rows import Rows
from zopro.zo.schedules import target_share

logger = logging.getLogger(__name__)

ROUNDING = 1e-6  # root mean square of noise below which projections have left nothing of it


class Targeted(Directions):
    """ZOPrO's direction: z = d mu + sqrt(1 - d^2) n_perp, per parameter tensor (the paper).

    mu is the policy's update over the previous iteration, v the reward model's update over the same one, and

        n ~ N(0, I);   n_perp = n - <v^, n> v^;   n_perp <- n_perp |mu| / |n_perp|.

    d is `target_share(step, total_steps, decay)`. Tensors without a reward update (v missing or 0) keep n as it is.
    Tensors without a previous update (mu missing or 0) would never move: they take n_perp alone, at the mean of the
    others' root mean squares, or unscaled if there are no others. (A one-element tensor has no noise orthogonal to its
    reward update, and moves along mu only; so does one whose noise is parallel to it, which `Signs` can be.)

    Args:
        previous_update: name -> mu; shapes of the parameters, and of no others than are trained. May be a lazy mapping.
        reward_update: name -> v; may lack tensors (a policy's head has no counterpart), may be empty.
        total_steps: steps of this iteration, N.
        decay: "linear" (0 at step N - 1) or "exponential".
        normalize: scale all of z by one factor so that mu, the whole of it, has root mean square 1, which gives `lr` and
            `eps` the meaning they have for Gaussian directions. False keeps the paper's scale.
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
        self.first_step = 0
        self.decay = decay
        self.normalize = normalize
        self.noise = noise or Gaussian()
        self._mu, self._v = there.Moved(previous_update), there.Moved(reward_update)
        self._norms = norms("previous_update", previous_update)
        self._reward_norms = norms("reward_update", reward_update)
        elements = {name: previous_update[name].numel() for name in self._norms}
        total = math.sqrt(sum(norm**2 for norm in self._norms.values()))
        self._scale = math.sqrt(sum(elements.values())) / total if normalize and total > 0 else 1.0
        sizes = [norm / math.sqrt(elements[name]) for name, norm in self._norms.items()]  # root mean squares
        self._rows: tuple[Any, list[tuple[list[int], Rows]]] | None = None
        self._mean_size = sum(sizes) / len(sizes) if sizes else None

    def begin(self, first_step: int, total_steps: int) -> None:
        """Let d decay anew, over `total_steps` from `first_step` on."""
        self.first_step, self.total_steps = first_step, total_steps

    def _share(self, step: int) -> float:
        return target_share(max(0, step - self.first_step), self.total_steps, self.decay)

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in named_params}
        check_update("previous_update", self.previous_update, shapes)
        check_update("reward_update", self.reward_update, shapes)
        warn_of_missing("previous_update", self.previous_update, shapes)
        if more := [name for name in self._norms if name not in shapes]:
            logger.warning(
                "previous_update: %d of its tensors are not trained, such as %s, and take part in the length of the "
                "others' steps. Leave them out.", len(more), more[0],
            )  # fmt: skip

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        noise = self._orthogonal_noise(name, like, seed, step)
        mu_norm = self._norms.get(name)
        if mu_norm is None:
            wanted = None if self._mean_size is None else self._mean_size * math.sqrt(noise.numel()) * self._scale
            return noise if wanted is None else _rescaled(noise, wanted)
        d = self._share(step)
        mu = self._mu.at(name, like.device)
        noise = _rescaled(noise, mu_norm)
        return noise.mul_(math.sqrt(1 - d * d)).add_(mu, alpha=d).mul_(self._scale)

    def tensors(self, named: Sequence[tuple[str, Tensor]], seed: int, step: int) -> list[Tensor]:
        if not all(there.waits(like.device) for _, like in named):
            return super().tensors(named, seed, step)
        noise = self.noise.tensors(named, seed, step)
        d, found = self._share(step), list[Tensor](noise)
        for places, rows in self._grouped(named):
            drawn = rows.directions(torch.stack([noise[place].flatten() for place in places]), d, self._scale)
            for place, z in zip(places, drawn, strict=True):
                found[place] = z.view(named[place][1].shape)
        return found

    def _grouped(self, named: Sequence[tuple[str, Tensor]]) -> list[tuple[list[int], Rows]]:
        """Places in `named` of tensors of one size and device, with what their directions are made of; kept."""
        key = tuple((name, like.shape, like.device) for name, like in named)
        if self._rows is None or self._rows[0] != key:
            sizes: dict[tuple[int, torch.device], list[int]] = {}
            for place, (_, like) in enumerate(named):
                sizes.setdefault((like.numel(), like.device), []).append(place)
            self._rows = (
                key,
                [
                    (places, self._rows_of([named[place][0] for place in places], size, device))
                    for (size, device), places in sizes.items()
                ],
            )
        return self._rows[1]

    def _rows_of(self, names: Sequence[str], size: int, device: torch.device) -> Rows:
        alone = None if self._mean_size is None else self._mean_size * math.sqrt(size) * self._scale
        updates = self.previous_update, self.reward_update, self._norms, self._reward_norms
        return Rows(names, size, device, *updates, alone, ROUNDING * math.sqrt(size))

    def _orthogonal_noise(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        """n - <v^, n> v^."""
        noise = self.noise.tensor(name, like, seed, step)
        norm = self._reward_norms.get(name)
        if norm is None:
            return noise
        return orthogonal_(noise, self._v.at(name, like.device) / norm)


def orthogonal_(tensor: Tensor, unit: Tensor) -> Tensor:
    """Take the component along `unit`, of norm 1, off `tensor` in place.

    Twice: once leaves rounding of the order of |tensor| where the two are nearly parallel. A one-element tensor has no
    direction orthogonal to another; what is left there is rounding, and is set to 0.
    """
    for _ in range(2):
        tensor.sub_(unit * (unit * tensor).sum())
    return tensor.zero_() if tensor.numel() == 1 else tensor


def _rescaled(noise: Tensor, norm: float) -> Tensor:
    """`noise`, drawn with root mean square 1, scaled to the given norm in place; what is but rounding becomes 0."""
    least = ROUNDING * math.sqrt(noise.numel())
    if there.waits(noise.device):
        return there.rescaled(noise, norm, least)
    current = norm_of(noise)
    return noise.mul_(norm / current) if current > least else noise.zero_()
