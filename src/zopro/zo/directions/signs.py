"""An earlier update with a random sign for each sub-layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from zopro.zo.directions import there
from zopro.zo.directions.base import Directions, check_update, gaussian, norms, tensor_generator


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
        ValueError: a non-finite update, or one of other parameters than those that are displaced.

    >>> Signs({"w": torch.tensor([3.0, 3.0])}).sample([("w", torch.zeros(2))], seed=0, step=3)["w"].abs()
    tensor([1., 1.])
    """

    def __init__(self, update: Mapping[str, Tensor]) -> None:
        self.update = update
        self._norms = norms("update", update)
        self._moved = there.Moved(update)

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        check_update("update", self.update, {name: tuple(tensor.shape) for name, tensor in named_params})

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        norm = self._norms.get(name)
        if norm is None:
            return gaussian(name, like, seed, step)
        generator = tensor_generator(sublayer(name), seed, step, torch.device("cpu"))
        sign = 1 - 2 * int(torch.randint(2, (), generator=generator))
        mu = self._moved.at(name, like.device)
        return mu * (sign * math.sqrt(mu.numel()) / norm)
