"""Exact Gram matrices of two trajectories in one pass over their files, one tensor at a time, a piece at a time.

Everything the analysis says is a function of inner products between checkpoints. For weights x_0 ... x_n of a trajectory
the rows are the displacements x_t - x_0 from its own start; for every tensor

    G[s, t] = <x_s - x_0, x_t - x_0>        [P, P], policy rows first, then the reward model's

so that layers, modules and the whole are sums. Everything is in float64, but for one thing: in an analysis of more than
`FLOAT64_WORK` the displacements of float32 (or narrower) files, and their products within a block of some thousand
columns, are in float32, whose rounding is that of the files themselves. Memory is a fixed piece of the rows and the Gram
matrices; for LoRA pairs see `zopro.analysis.numbers.products`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from threading import local

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from zopro.analysis.numbers.products import add_factored
from zopro.analysis.reading.parts import PRODUCT, Factors, Pairing, Part
from zopro.analysis.reading.streaming import (
    Grams,
    Points,
    Sums,
    ahead,
    block_size,
    edges_of,
    piece_size,
    refuse_not_finite,
)
from zopro.system.threads import torch_threads
from zopro.weights.tensors import Stored, read_rows

MAX_WORKERS = 5  # each holds a piece
FLOAT64_WORK = 2**37  # checkpoints^2 x parameters; a larger analysis multiplies float32 in float32, a block at a time


def gram_matrices(pairing: Pairing, points: Points, coordinates: int, seed: int = 0) -> dict[str, Grams]:
    """Read every file once (groups of wide LoRA products apart) and return the Gram matrices of every view.

    Args:
        pairing: which tensors to read.
        points: which rows they make.
        coordinates: sample this many coordinates (uniformly, without repetition; all of them where there are fewer)
            for what no inner product gives.
        seed: of that sample.

    Raises:
        InputError: a file is truncated or holds NaN or infinity; the message names it.
    """
    sums = {view: Sums(view, pairing.parts, points, coordinates, seed) for view in pairing.views}
    dense: list[tuple[int, list[Stored]]] = []
    for index, part in enumerate(pairing.parts):
        kinds = {type(row) for row in part.rows}
        if kinds == {Stored}:
            dense.append((index, [row for row in part.rows if isinstance(row, Stored)]))
        elif kinds == {Factors}:
            add_factored(index, part, points, sums)
        else:
            _mixed(index, part, points, sums[PRODUCT])
    _add_dense(dense, points, list(sums.values()))
    return {view: found.result() for view, found in sums.items()}


def _add_dense(parts: Sequence[tuple[int, list[Stored]]], points: Points, views: Sequence[Sums]) -> None:
    """Tensors compared as they are stored, [Q, numel] each, in pieces; several threads read and multiply at once."""
    work = points.total**2 * sum(stored[0].numel for _, stored in parts)
    kept = local()

    def piece(index: int, stored: Sequence[Stored], bytes_each: int, dtype: torch.dtype, first: int, last: int) -> _Piece:
        size = (last - first) * bytes_each
        if not hasattr(kept, "space") or len(kept.space) < size:
            kept.space = torch.empty(size, dtype=torch.uint8)
        raw = read_rows(stored, first, last, kept.space)
        found = _displaced(raw, points, views, index, first, dtype)
        refuse_not_finite(found.gram, raw, stored)
        return found

    def pieces() -> Iterator[Callable[[], _Piece]]:
        for index, stored in parts:
            bytes_each = sum(one.dtype.itemsize for one in stored)
            wide = work <= FLOAT64_WORK or any(one.dtype == torch.float64 for one in stored)
            dtype = torch.float64 if wide else torch.float32
            for first, last in edges_of(stored[0].numel, piece_size(bytes_each)):
                yield partial(piece, index, stored, bytes_each, dtype, first, last)

    workers = min(MAX_WORKERS, torch.get_num_threads() + 1)  # one waits for the disk
    with torch_threads(1), threadpool_limits(1):  # each: so that sums are the same for any number of workers
        for found in ahead(pieces(), workers):
            found.add_to(views)


@dataclass(frozen=True)
class _Piece:
    """What a piece of a part adds: inner products [Q, Q], sums [Q] and each view's sampled coordinates [Q, some]."""

    index: int
    gram: np.ndarray
    sums: np.ndarray
    kept: list[np.ndarray]

    def add_to(self, views: Sequence[Sums]) -> None:
        for view, values in zip(views, self.kept, strict=True):
            view.add(self.index, self.gram, self.sums)
            view.keep(self.index, values)


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is refused by name
def _displaced(
    raw: Sequence[Tensor],
    points: Points,
    views: Sequence[Sums],
    index: int,
    first: int,
    dtype: torch.dtype = torch.float64,
) -> _Piece:
    """Displacements of a piece, multiplied in blocks; a last row of ones makes their sums inner products too."""
    count, length = len(raw), len(raw[0])
    size = min(length, block_size((count + 1) * dtype.itemsize))
    space, gram = torch.ones(count + 1, size, dtype=dtype), np.zeros((count + 1, count + 1))
    kept: list[list[np.ndarray]] = [[] for _ in views]
    for a, b in edges_of(length, size):
        block = space[:, : b - a]
        if isinstance(raw, Tensor):
            block[:count] = raw[:, a:b]
        else:
            for row, values in zip(block[:count], raw, strict=True):
                row.copy_(values[a:b])
        rows = block.numpy()
        points.take_apart(rows[points.policy : count])
        points.displace(rows[:count])
        gram += rows @ rows.T
        for view, found in zip(views, kept, strict=True):
            found.append(rows[:count, view.inside(index, first + a, first + b)])
    return _Piece(index, gram[:count, :count], gram[count, :count], [np.concatenate(found, 1) for found in kept])


def _mixed(index: int, part: Part, points: Points, view: Sums) -> None:
    """A policy of whole weights against a LoRA reward model: rows of the product are formed piece by piece."""
    first_size = next(row.shape for row in part.rows if isinstance(row, Stored))
    width = part.numel // first_size[0]
    for first, last in edges_of(first_size[0], max(1, piece_size(4 * len(part.rows) * width))):
        raw = [_weight_rows(row, first, last).flatten() for row in part.rows]
        found = _displaced(raw, points, [view], index, first * width)
        refuse_not_finite(found.gram, raw, [row if isinstance(row, Stored) else row.a for row in part.rows])
        found.add_to([view])


def _weight_rows(row: Stored | Factors, first: int, last: int) -> Tensor:
    """[last - first, width]: rows of the weight."""
    if isinstance(row, Stored):
        return row.flat(first * row.width, last * row.width).view(last - first, row.width)
    if row.transposed:
        b = row.b.flat(0, row.b.numel).view(-1, row.rank).double()
        return row.scale * row.a.columns(first, last).double().T @ b.T
    b = row.b.flat(first * row.rank, last * row.rank).view(-1, row.rank).double()
    return row.scale * b @ row.a.columns(0, row.a.width).double()
