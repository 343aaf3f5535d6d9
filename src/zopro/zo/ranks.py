"""Many processes ("ranks") taking the same steps: who evaluates what, and the scalars they tell each other.

Every rank draws the same directions, and learns the same losses, so every rank takes the same step: nothing else needs
to be exchanged, whatever the size of the model. Losses are gathered rather than reduced on the way: each rank adds the
same float64 numbers in the same order, so all have the same bits whichever algorithm a reduction would have used.

    torch.distributed.init_process_group("gloo")
    opt = SPSA(model.named_parameters(), ranks=Ranks("data"))       # each rank's closure sees its share of the batch
    opt = SPSA(model.named_parameters(), queries=8, ranks=Ranks("queries"))     # each sees all; evaluations are dealt out
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from zopro.choices import PARALLEL

T = TypeVar("T")


class Ranks:
    """The ranks of one process group of `torch.distributed`, which must be initialised.

    Args:
        parallel: "data": every rank evaluates all directions on its share of the batch, and losses are averaged over
            ranks (the shares must be of equal size). "queries": every rank has the whole batch and evaluates every
            `size`-th of a step's displacements; the losses are those that one rank would find.
        device: of the tensors that the group exchanges: "cpu" for gloo, the rank's GPU for NCCL.
        group: the process group; None is the default one.

    Raises:
        ValueError: another `parallel`.
    """

    def __init__(
        self, parallel: str = "data", device: torch.device | str = "cpu", group: dist.ProcessGroup | None = None
    ) -> None:
        if parallel not in PARALLEL:
            raise ValueError(f"parallel: must be one of {', '.join(PARALLEL)}, got {parallel!r}")
        self.parallel, self.device, self.group = parallel, device, group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, object]) -> Ranks:
        return self  # a process group is not to be copied

    def losses(self, evaluate: Callable[[Sequence[int]], list[float]], count: int) -> list[float]:
        """The losses of `count` displacements, in one exchange.

        Args:
            evaluate: this rank's losses at those of the given indices, all that it is to evaluate in one call.
        """
        if self.parallel == "data":
            return self.mean(evaluate(range(count)))
        return [row[0] for row in self._dealt(lambda mine: [[value] for value in evaluate(mine)], count)]

    def rewards(self, evaluate: Callable[[Sequence[int]], list[list[float]]], count: int) -> list[list[float]]:
        """The rewards of `count` displacements, for each prompt of all ranks, in one exchange.

        Args:
            evaluate: as for `losses`, a row for each displacement: of this rank's prompts (on every rank as many).
        """
        if self.parallel != "data":
            return self._dealt(evaluate, count)
        own = evaluate(range(count))
        width = len(own[0])
        shares = self.gather([value for row in own for value in row])
        return [[v for share in shares for v in share[m * width : (m + 1) * width]] for m in range(count)]

    def _dealt(self, evaluate: Callable[[Sequence[int]], list[list[float]]], count: int) -> list[list[float]]:
        """A row of numbers for each displacement, of which every rank evaluates its part."""
        mine = range(self.rank, count, self.size)
        rows = evaluate(mine)
        width = len((rows or evaluate([0]))[0])  # leaves the random state where the other ranks' evaluations leave theirs
        share = -(-count // self.size)
        flat = [value for row in rows for value in row] + [0.0] * (share - len(rows)) * width
        found = self.gather(flat)
        starts = [(found[index % self.size], index // self.size * width) for index in range(count)]
        return [values[start : start + width] for values, start in starts]

    def mean(self, values: Sequence[float]) -> list[float]:
        """The mean over ranks of each value, equal on every rank to the bit."""
        return [sum(column) / self.size for column in zip(*self.gather(values), strict=True)]

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """Every rank's values, by rank; each must give as many."""
        rows: list[list[float]] = self._gather(torch.tensor(values, dtype=torch.float64)).tolist()
        return rows

    def any(self, bits: int, count: int) -> int:
        """The `count` bits of a number that are set on any rank: a byte for each, once."""
        if not dist.is_initialized():  # a stand-in for ranks, which exchanges losses alone
            return bits
        rows = self._gather(torch.tensor([bits >> index & 1 for index in range(count)], dtype=torch.uint8))
        return sum(1 << index for index, bit in enumerate(rows.any(0).tolist()) if bit)

    def differing(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the tensors that are not the same on every rank, by a checksum of their bits."""
        named = dict(tensors)
        sums = self._gather(torch.stack([checksum(tensor) for tensor in named.values()]))
        return [name for name, same in zip(named, (sums == sums[0]).all(0).tolist(), strict=True) if not same]

    @torch.no_grad()
    def share(self, tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Where ranks hold different values, give all of them the first rank's; returns the names of those tensors.

        The one exchange that is as large as what it is about: once, before the first step, and only where it is needed.
        """
        named, group = dict(tensors), self.group or dist.group.WORLD
        assert group is not None
        names = self.differing(named.items())
        for name in names:
            tensor = named[name].detach()
            flat = tensor.contiguous().flatten().view(torch.uint8).to(self.device)
            dist.broadcast(flat, src=dist.get_global_rank(group, 0), group=group)
            tensor.copy_(flat.to(tensor.device).view(tensor.dtype).view(tensor.shape))
        return names

    def _gather(self, values: Tensor) -> Tensor:
        """(size, n) on the CPU, of each rank's (n,)."""
        own = values.to(self.device)
        rows = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(rows, own, group=self.group)
        return torch.stack(rows).cpu()


def losses_of_all(ranks: Ranks | None, values: Callable[[Sequence[T]], list[float]], at: Sequence[T]) -> list[float]:
    """The losses at displacements: of all ranks, of which each asks `values` once; without ranks, what `values` says."""
    if ranks is None or not at:
        return values(at) if at else []
    return ranks.losses(lambda indices: values([at[index] for index in indices]) if indices else [], len(at))


def checksum(tensor: Tensor) -> Tensor:
    """The sum of a tensor's bits, read as 32-bit integers: int64 on the CPU, whatever the order of addition.

    >>> bool(checksum(torch.tensor([1.0, 2.0])) == checksum(torch.tensor([1.0, 2.0000002])))
    False
    """
    flat = tensor.detach().contiguous().flatten().view(torch.uint8)
    flat = flat.clone() if flat.storage_offset() % 4 else flat
    whole = flat.numel() // 4 * 4
    return (flat[:whole].view(torch.int32).sum(dtype=torch.int64) + flat[whole:].sum(dtype=torch.int64)).cpu()
