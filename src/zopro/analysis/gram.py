"""Exact Gram matrices of two trajectories in one pass over their files, one tensor at a time, a piece at a time.

Everything the analysis says is a function of inner products between checkpoints. For weights x_0 ... x_n of a trajectory
the rows are the displacements x_t - x_0 from its own start; for every tensor

    G[s, t] = <x_s - x_0, x_t - x_0>        [P, P], policy rows first, then the reward model's

so that layers, modules and the whole are sums. All sums are in float64; memory is a fixed piece of the rows and the Gram
matrices themselves; for LoRA pairs see `zopro.analysis.products`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from zopro.analysis import streaming
from zopro.analysis.parts import PRODUCT, Factors, Pairing, Part
from zopro.analysis.products import add_factored
from zopro.analysis.streaming import Grams, Points, Sums, ahead, edges_of, piece_size, refuse_not_finite
from zopro.analysis.tensors import Stored, read_rows


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
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below, by name
        for index, part in enumerate(pairing.parts):
            kinds = {type(row) for row in part.rows}
            if kinds == {Stored}:
                _dense(index, part, points, list(sums.values()))
            elif kinds == {Factors}:
                add_factored(index, part, points, sums)
            else:
                _mixed(index, part, points, sums[PRODUCT])
    return {view: found.result() for view, found in sums.items()}


def _dense(index: int, part: Part, points: Points, views: Sequence[Sums]) -> None:
    """Tensors compared as they are stored, [Q, numel] in pieces."""
    stored = [row for row in part.rows if isinstance(row, Stored)]
    edges = list(edges_of(stored[0].numel, piece_size(sum(one.dtype.itemsize for one in stored))))
    jobs = ((lambda a=a, b=b: read_rows(stored, a, b)) for a, b in edges)
    for (first, _), raw in zip(edges, ahead(jobs), strict=True):
        gram, sums = _displaced(raw, points, views, index, first)
        refuse_not_finite(gram, raw, stored)
        for view in views:
            view.add(index, gram, sums)


def _displaced(
    raw: Sequence[Tensor], points: Points, views: Sequence[Sums], index: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix and sums of the displacements of a piece, in blocks; sampled coordinates are kept on the way."""
    gram, sums = np.zeros((len(raw), len(raw))), np.zeros(len(raw))
    for a, b in edges_of(len(raw[0]), streaming.BLOCK):
        block = raw[:, a:b] if isinstance(raw, Tensor) else torch.stack([piece[a:b].double() for piece in raw])
        rows = points.displace(block.double().numpy())
        gram += rows @ rows.T
        sums += rows.sum(1)
        for view in views:
            view.keep(index, rows[:, view.inside(index, first + a, first + b)])
    return gram, sums


def _mixed(index: int, part: Part, points: Points, view: Sums) -> None:
    """A policy of whole weights against a LoRA reward model: rows of the product are formed piece by piece."""
    first_size = next(row.shape for row in part.rows if isinstance(row, Stored))
    width = part.numel // first_size[0]
    for first, last in edges_of(first_size[0], max(1, piece_size(4 * len(part.rows) * width))):
        raw = [_weight_rows(row, first, last).flatten() for row in part.rows]
        gram, sums = _displaced(raw, points, [view], index, first * width)
        refuse_not_finite(gram, raw, [row if isinstance(row, Stored) else row.a for row in part.rows])
        view.add(index, gram, sums)


def _weight_rows(row: Stored | Factors, first: int, last: int) -> Tensor:
    """[last - first, width]: rows of the weight."""
    if isinstance(row, Stored):
        return row.flat(first * row.width, last * row.width).view(last - first, row.width)
    if row.transposed:
        b = row.b.flat(0, row.b.numel).view(-1, row.rank).double()
        return row.scale * row.a.columns(first, last).double().T @ b.T
    b = row.b.flat(first * row.rank, last * row.rank).view(-1, row.rank).double()
    return row.scale * b @ row.a.columns(0, row.a.width).double()
