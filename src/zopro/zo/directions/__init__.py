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

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from zopro.choices import DIRECTIONS
from zopro.zo.directions.base import Directions, norm_of, tensor_generator
from zopro.zo.directions.gaussian import Gaussian
from zopro.zo.directions.low_rank import LowRank
from zopro.zo.directions.rademacher import Rademacher
from zopro.zo.directions.signs import Signs, sublayer
from zopro.zo.directions.targeted import Targeted, orthogonal_

__all__ = [
    "Directions",
    "Gaussian",
    "LowRank",
    "Rademacher",
    "Signs",
    "Targeted",
    "noise_source",
    "norm_of",
    "orthogonal_",
    "sublayer",
    "tensor_generator",
]


def noise_source(name: str, update: Mapping[str, Tensor], **arguments: Any) -> Directions:
    """What n is drawn from, by its name in `zopro.choices.DIRECTIONS`; `Gaussian` for one made of an update, if that is
    empty.

    Raises:
        InputError: no such name.

    >>> noise_source("low_rank", {}, rank=2).rank
    2
    """
    choice = DIRECTIONS[name]
    if choice.of_update:
        return choice.load()(update, **arguments) if len(update) else Gaussian()
    made: Directions = choice.load()(**arguments)
    return made
