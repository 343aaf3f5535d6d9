"""Many displaced policies in one pass of the base weights: each row of a batch reads its own member's matrices.

A displaced policy differs from theta in a few small matrices (LoRA's factors). So the base model's weights serve the rows
of all members at once, and only the products with displaced matrices are taken group by group:

    y_row = x_row W_m^T,  W_m = W + t_m eps z_m,  m the row's member

Where a pass is bound by reading weights, P members cost little more than one. Numbers differ from those of members one
after another by the rounding of sums. What it cannot do it refuses (`Apart`), and the caller goes on one by one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from zopro.zo.displacement import Displacement
from zopro.zo.perturbation import describes, displaced
from zopro.zo.weights import Weights


class Apart(Exception):
    """These displacements cannot go through the network together; its text says why."""


class Members(TorchFunctionMode):
    """Within the context, rows of a batch read the matrices of the members that `choose` gave them.

    Args:
        weights: what is displaced.
        at: the members' displacements; None and t = 0 are theta.

    Raises (here, or in the context):
        Apart: a displaced tensor is not a matrix, or is read otherwise than as the matrix of a linear layer over (rows,
            time, features).
    """

    def __init__(self, weights: Weights, at: Sequence[Displacement | None]) -> None:
        super().__init__()
        if any(tensor.dim() != 2 for _, tensor, _ in weights.entries):
            raise Apart("a displaced tensor is not a matrix")
        self.count = len(at)
        self._tensors = [tensor for _, tensor, _ in weights.entries]
        self._index = {id(tensor): index for index, tensor in enumerate(self._tensors)}
        self._offsets = [
            None if displacement is None or displacement.t == 0 else (displacement, weights.offset(displacement))
            for displacement in at
        ]
        self._stacks: dict[int, Tensor] = {}
        self._rows = torch.empty(0, dtype=torch.long)

    def choose(self, rows: Tensor) -> None:
        """Say which member each row of the coming passes belongs to: (B,) int64."""
        self._rows = rows
        sizes = torch.bincount(rows, minlength=self.count)
        width = int(sizes.max())
        order = torch.argsort(rows, stable=True)
        starts = sizes.cumsum(0) - sizes
        place = torch.empty_like(rows)
        place[order] = torch.arange(len(rows), device=rows.device) - starts[rows[order]]  # inside of its group
        self._slot = rows * width + place  # where each row stands among count x width
        self._width = width
        self._ordered = bool((self._slot == torch.arange(len(rows), device=rows.device)).all()) and bool(
            (sizes == width).all()
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.choose(self._rows[rows])

    def settle(self, held: dict[object, Tensor]) -> Hashable:
        """Move what rows read to the tensors in `held`, where they fit, and leave there what does not.

        A captured step reads at fixed addresses, and other members come to the same ones.

        Returns:
            All that such a step holds for good.
        """
        for index, stack in self._stacks.items():
            self._stacks[index] = _settled(held, index, stack)
        self._slot = _settled(held, "slot", self._slot)
        read = [(tensor.data_ptr(), tensor.shape) for tensor in (*self._stacks.values(), self._slot)]
        return self.count, self._width, self._ordered, *read

    def _stack(self, index: int) -> Tensor:
        """(P, in, out): each member's matrix, transposed. Made when it is first read."""
        if index not in self._stacks:
            tensor, made, last = self._tensors[index], list[Tensor](), None
            for member in self._offsets:
                if member is None:
                    made.append(tensor.detach())
                    continue
                displacement, offset = member
                mirrored = last is not None and last[0] == displacement.mirrored
                z = -last[1] if mirrored and last is not None else offset(index)
                last = displacement, z
                made.append(displaced(tensor, z.clone()))
            self._stacks[index] = torch.stack(made).transpose(1, 2)
        return self._stacks[index]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self._index[id(value)] for value in tree_leaves((args, kwargs)) if id(value) in self._index]
        if not read or describes(func):
            return func(*args, **kwargs)
        x = args[0]
        fits = func is functional.linear and len(read) == 1 and x is not self._tensors[read[0]]
        if not fits or x.dim() != 3 or len(x) != len(self._rows):
            raise Apart(f"a displaced matrix is read by {getattr(func, '__name__', func)}")
        output = self._products(x, self._stack(read[0]))
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return output if bias is None else output + bias

    def _products(self, x: Tensor, stack: Tensor) -> Tensor:
        """(B, T, out) of x (B, T, in) and the members' matrices (P, in, out)."""
        rows, time, features = x.shape
        if self._ordered:
            grouped = x.reshape(self.count, -1, features)
            return torch.bmm(grouped, stack).view(rows, time, -1)
        grouped = x.new_zeros(self.count * self._width, time, features)
        grouped[self._slot] = x
        products = torch.bmm(grouped.view(self.count, -1, features), stack)
        return products.view(-1, time, stack.shape[-1])[self._slot]


def _settled(held: dict[object, Tensor], name: object, tensor: Tensor) -> Tensor:
    kept = held.get(name)
    if (
        kept is None
        or kept.is_inference()
        or (kept.shape, kept.stride(), kept.dtype) != (tensor.shape, tensor.stride(), tensor.dtype)
    ):
        held[name] = tensor
        return tensor
    return kept if kept is tensor else kept.copy_(tensor)
