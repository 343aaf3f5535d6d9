"""Many displaced policies in one pass of the base weights: each row of a batch reads its own member's matrices.

Members theta + t eps z differ in t and in their direction's eps z. So the weights themselves serve the rows of all
members at once, and only what a direction adds is taken group by group:

    y_row = x_row W^T + t_row x_row (eps z_q)^T,  q the row's direction

The two sides of a direction share its eps z. Where z has few columns (LoRA's factors, or `LowRank` noise on full
parameters, whose factors are used as they are: EGGROLL, arXiv 2511.16652), a member costs a product of few columns beside
the shared one. Numbers differ from those of members one after another by the rounding of sums. What it cannot do it
refuses (`Apart`), and the caller goes on one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from zopro.engine.local.few_rows import left_alone
from zopro.engine.local.products import fast_products
from zopro.zo.displacement import Displacement
from zopro.zo.perturbation import describes, tensors_in
from zopro.zo.weights import Weights

WIDEST = 256  # rank of eps z from which on its products are no longer small beside the shared one


class Apart(Exception):
    """These displacements cannot go through the network together; its text says why."""


class _Rows:
    """Some rows of a batch, brought into groups of the same direction for batched products."""

    def __init__(self, direction: Tensor, t: Tensor, groups: int) -> None:
        self.direction, self.t, self.groups = direction, t, groups
        here = torch.arange(len(direction), device=direction.device)
        sizes = torch.bincount(direction, minlength=groups)
        width = int(sizes.max())
        order = torch.argsort(direction, stable=True)
        place = torch.empty_like(direction)
        place[order] = here - (sizes.cumsum(0) - sizes)[direction[order]]  # inside of its group
        self._slot = direction * width + place  # where each row stands among groups x width
        self._padded = groups * width
        self._even = self._padded == len(direction) and bool((self._slot == here).all())

    def settle(self, held: dict[object, Tensor]) -> Hashable:
        """As `Members.settle`."""
        for name in ("direction", "t", "_slot"):
            setattr(self, name, _settled(held, name, getattr(self, name)))
        return self.groups, self._padded, self._even, *(_address(part) for part in (self.direction, self.t, self._slot))

    def grouped(self, x: Tensor) -> Tensor:
        """(groups, width * T, F) of x (B, T, F); groups of fewer rows end with zeros."""
        if not self._even:
            x, rows = x.new_zeros(self._padded, *x.shape[1:]), x
            x[self._slot] = rows
        return x.reshape(self.groups, -1, x.shape[-1])

    def back(self, grouped: Tensor, time: int) -> Tensor:
        """(B, T, F), the inverse of `grouped`."""
        rows = grouped.view(self._padded, time, -1)
        return rows if self._even else rows[self._slot]

    def scaled(self, x: Tensor) -> Tensor:
        """t x, of x (B, ...)."""
        return x * self.t.view(-1, *[1] * (x.dim() - 1))


class Members(TorchFunctionMode):
    """Within the context, rows of a batch read the tensors of the members that `choose` gave them.

    Args:
        weights: what is displaced.
        at: the members' displacements; None and t = 0 are theta.

    Raises (here, or in the context):
        Apart: a direction is as large as a large matrix itself, or a displaced tensor is read in a way not known here.
    """

    def __init__(self, weights: Weights, at: Sequence[Displacement | None]) -> None:
        super().__init__()
        self.count = len(at)
        self._tensors = [tensor for _, tensor, _ in weights.entries]
        self._index = {id(tensor): index for index, tensor in enumerate(self._tensors)}
        units = [None if one is None or one.t == 0 else dataclasses.replace(one, t=1.0) for one in at]
        directions = list(dict.fromkeys(unit for unit in units if unit is not None))
        self._offsets = [(weights.offset(unit), weights.factors(unit)) for unit in directions]
        device = self._tensors[0].device if self._tensors else None
        self._direction = torch.tensor([0 if unit is None else directions.index(unit) for unit in units], device=device)
        self._t = torch.tensor([0.0 if one is None else one.t for one in at], device=device)
        self._added: dict[int, list[Tensor]] = {}
        self._members = torch.empty(0, dtype=torch.long)
        self._parts: dict[tuple[int, int], _Rows] = {}
        self._next, self._fixed = 0, False

    def __enter__(self) -> Members:
        super().__enter__()
        self._left = left_alone(self._index)
        self._left.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._left.__exit__(*exception)
        super().__exit__(*exception)

    def choose(self, members: Tensor) -> None:
        """Say which member each row of the coming passes belongs to: (B,) int64."""
        self._members, self._next, self._fixed = members, 0, False
        self._parts = {(0, len(members)): self._made(members)} if self._offsets else {}

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.choose(self._members[rows])

    def settle(self, held: dict[object, Tensor]) -> Hashable:
        """Move what rows read to the tensors in `held`, where they fit, and leave there what does not.

        A captured step reads at fixed addresses, and other members come to the same ones.

        Returns:
            All that such a step holds for good.
        """
        if not self._offsets:
            return ()
        rows = self._rows(len(self._members), whole=True)
        self._fixed = True
        read: list[Hashable] = [rows.settle(held)]
        for index in range(len(self._tensors)):  # also what the prompts' pass has not read, such as an output matrix
            kept = [_settled(held, (index, n), matrix) for n, matrix in enumerate(self._what_is_added(index))]
            self._added[index] = kept
            read += [_address(matrix) for matrix in kept]
        return tuple(read)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = [self._index[id(value)] for value in tensors_in((args, kwargs)) if id(value) in self._index]
        if not read or not self._offsets or describes(func):
            return func(*args, **kwargs)
        if func is functional.linear and args[0].dim() in (2, 3):
            return self._linear(*args, **kwargs)
        if func is functional.embedding and len(args) > 1 and args[0].dim() == 2 and len(args[0]) == len(self._members):
            return func(*args, **kwargs) + self._embedded(args[0], read[0])
        if func in (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__) and len(read) == 1:
            vector, x = (args[0], args[1]) if id(args[0]) in self._index else (args[1], args[0])
            if isinstance(x, Tensor) and vector.dim() == 1 and x.dim() > 2 and len(x) == len(self._members):
                return func(x, self._vectors(vector, x.dim() - 2).to(vector.dtype))
        raise Apart(f"a displaced tensor is read by {getattr(func, '__name__', func)}")

    def _rows(self, count: int, whole: bool) -> _Rows:
        """Those of the batch, or the next `count` of it, which an output matrix gets piece by piece."""
        total = len(self._members)
        if count > total - self._next or (whole and count != total):
            raise Apart("a displaced tensor is read with rows that are not the batch's")
        key = self._next, count
        self._next = (self._next + count) % total
        if key not in self._parts:
            if self._fixed:
                raise Apart("a displaced output matrix is read piece by piece in a captured step")
            self._parts[key] = self._made(self._members[key[0] : key[0] + count])
        return self._parts[key]

    def _made(self, members: Tensor) -> _Rows:
        return _Rows(self._direction[members], self._t[members], len(self._offsets))

    def _what_is_added(self, index: int) -> list[Tensor]:
        """eps z of all directions as matrices to multiply with: (Q, in, out), or factors (Q, in, r) and (Q, r, out).

        (Q, n) of a vector. Made when it is first read, and kept for all tokens.
        """
        if index not in self._added:
            tensor = self._tensors[index]
            pairs = [factors(index) for _, factors in self._offsets]
            if tensor.dim() == 2 and all(pair is not None for pair in pairs):
                left, right = (torch.stack([pair[side] for pair in pairs if pair is not None]) for side in (0, 1))
                self._added[index] = [right, left.transpose(1, 2)]
            elif tensor.dim() > 2 or (tensor.dim() == 2 and min(tensor.shape) > WIDEST):
                raise Apart(f"a direction of {tuple(tensor.shape)} is as large as the matrix, which low_rank's is not")
            else:
                stack = torch.stack([offset(index) for offset, _ in self._offsets])
                self._added[index] = [stack.transpose(1, 2) if tensor.dim() == 2 else stack]
        return self._added[index]

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + b, (B, T, out) of (B, T, in), or (n, out) of the next n rows (n, in)."""
        if id(x) in self._index:
            raise Apart("a displaced tensor is read as what a linear layer gets")
        rows = self._rows(len(x), whole=x.dim() == 3)
        with fast_products(x.dtype, x.device, x.numel() // x.shape[-1]):
            result = functional.linear(x, weight.detach(), None if bias is None else bias.detach())
        deep = x if x.dim() == 3 else x[:, None]
        wide = result.float().view(*deep.shape[:2], -1)
        if id(weight) in self._index:
            wide = self._products(rows, deep.float(), wide, self._what_is_added(self._index[id(weight)]))
        if bias is not None and id(bias) in self._index:
            wide = wide + rows.scaled(self._what_is_added(self._index[id(bias)])[0][rows.direction])[:, None]
        return wide.view(result.shape).to(result.dtype)

    def _products(self, rows: _Rows, x: Tensor, base: Tensor, matrices: list[Tensor]) -> Tensor:
        """base + t x z^T; t is multiplied where there are fewest columns."""
        *first, last = matrices
        time, at_end = x.shape[1], not first and x.shape[-1] > last.shape[-1]
        for matrix in first:  # factors: few columns now
            x = rows.back(torch.bmm(rows.grouped(x), matrix), time)
        added = torch.bmm(rows.grouped(x if at_end else rows.scaled(x)), last)
        back = rows.back(added, time)
        return base.add_(rows.scaled(back) if at_end else back)

    def _embedded(self, ids: Tensor, index: int) -> Tensor:
        """t eps z of each token: (B, T, H)."""
        rows = self._rows(len(ids), whole=True)
        if self._tensors[index].dim() != 2:
            raise Apart("a displaced tensor is read by embedding")
        *first, last = self._what_is_added(index)
        found = last[rows.direction[:, None], :, ids]  # (B, T, r), or (B, T, H)
        if first:
            found = found @ first[0][rows.direction].transpose(1, 2)
        return rows.scaled(found).to(self._tensors[index].dtype)

    def _vectors(self, vector: Tensor, dims: int) -> Tensor:
        """w + t eps z of each row: (B, 1, ..., n)."""
        rows = self._rows(len(self._members), whole=True)
        moved = vector.detach() + rows.scaled(self._what_is_added(self._index[id(vector)])[0][rows.direction])
        return moved.view(len(moved), *[1] * dims, -1)


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


def _address(tensor: Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape
