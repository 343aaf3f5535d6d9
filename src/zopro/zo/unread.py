"""Tensors that the loss never reads are left out: their gradient is zero, and random steps would only make them drift.

Such are the adapters of a vision tower in a run on text, or a head that is not used. They are found while the first loss
is measured (`zopro.zo.reads`), and believed to be unread only if moving them far changes no bit of it: in doubt a tensor
counts as read. One that a later batch reads takes part from then on; what is read once counts as read for good.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from zopro.zo.directions import Gaussian
from zopro.zo.groups import Entry
from zopro.zo.perturbation import IN_PLACE_LIMIT, InPlace
from zopro.zo.ranks import Ranks
from zopro.zo.reads import Reads

logger = logging.getLogger(__name__)

Losses = Callable[[], list[float]]
FAR = 0.01  # a tensor is moved by this more than its root mean square where that is to show in the loss


class Unread:
    """Which tensors are left out, as far as that is known.

    Attributes:
        read: names of the tensors that the loss reads.
        left_out: name -> whether a torch function was given the tensor all the same.
    """

    _said = False

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.left_out: dict[str, bool] = {}

    def warn_of_virtual(self) -> None:
        """Say, once, that virtual displacements reach nothing: no torch function is given a tensor."""
        if not self._said:
            self._said = True
            logger.warning(
                "perturbation: 'virtual' displaces nothing that this loss is seen to read (TorchScript?), and it stays "
                "equal. Use perturbation='in_place'."
            )

    def watch(self, named: Sequence[Entry]) -> Reads | None:
        """What is to watch a measurement: for the tensors that are not known to be read."""
        watched = [tensor for name, tensor, _ in named if name not in self.read]
        return Reads(watched) if watched else None

    def look(self, reads: Reads, losses: Losses, ranks: Ranks | None, named: Sequence[Entry]) -> None:
        """Find out about those that were watched.

        Args:
            losses: at a displacement that shows in them. Near it, unlike at theta, nothing is hidden by a factor that
                happens to be 0, such as LoRA's B before the first step. Asked two or three times (more where what seems
                unread is too large to be copied at once), and not at all where everything is seen to be read.
            ranks: whose evaluations count too.
            named: all tensors that may move.
        """
        watched = [name for name, _, _ in named if name not in self.read]
        count = len(watched)
        bits = reads.used | reads.touched << count
        bits = bits if ranks is None else ranks.any(bits, 2 * count)
        used, touched = bits & (1 << count) - 1, bits >> count
        new = [index for index, name in enumerate(watched) if name not in self.left_out]
        displaced = len(named) - len(self.left_out)
        unread = set(_confirmed(reads.tensors, new, used, touched, losses, displaced))
        begun = 0
        for index, name in enumerate(watched):
            if index in unread:
                self.left_out[name] = bool(touched >> index & 1)
            elif index in new:
                self.read.add(name)
            elif used >> index & 1 or (touched >> index & 1 and not self.left_out[name]):
                begun += 1
                self.read.add(name)
                del self.left_out[name]
        if unread or begun:
            logger.warning(
                "the loss does not read %d of the %d tensors to be trained%s: they stay as they are%s",
                len(self.left_out),
                len(named),
                f", such as {next(iter(self.left_out))}" if self.left_out else "",
                f" ({begun} are read from here on)" if begun else "",
            )

    def state(self) -> dict[str, Any]:
        return {"read": sorted(self.read), "left_out": dict(self.left_out)}

    def load(self, state: dict[str, Any]) -> None:
        self.read, self.left_out = set(state["read"]), dict(state["left_out"])


def _confirmed(
    tensors: Sequence[Tensor], new: list[int], used: int, touched: int, losses: Losses, displaced: int
) -> list[int]:
    """Those of the `new` indices that the loss does not read: never all that were displaced, since it has changed."""
    expected, asked = list[float](), list[int]()
    # A kernel that is not seen hides what leads to it. What no function was given is then still worth the question.
    for read in (used, used | touched):
        left = [index for index in new if not read >> index & 1]
        if not left or left == asked:
            break
        if len(left) == displaced:
            continue
        expected = expected or losses()
        if all(_further(part, losses) == expected for part in _parts([tensors[index] for index in left])):
            return left
        asked = left
    return []


def _parts(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """As large as may be copied at once."""
    part, size = list[Tensor](), 0
    for tensor in tensors:
        if part and size + tensor.numel() > IN_PLACE_LIMIT:
            yield part
            part, size = [], 0
        part.append(tensor)
        size += tensor.numel()
    yield part


def _further(tensors: Sequence[Tensor], losses: Losses) -> list[float]:
    """The losses with some of the tensors moved far before they are displaced."""

    def far(index: int) -> Tensor:
        tensor = tensors[index].detach()
        size = float(tensor.float().square().mean().sqrt()) if tensor.numel() else 0.0
        return Gaussian().tensor(str(index), tensor, seed=0, step=-1).mul_(size + FAR)

    with InPlace(tensors).at(far):
        return losses()
