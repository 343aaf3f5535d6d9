"""Inner products of LoRA pairs: the factors as they are stored and their product, from one reading.

With W_t = scale B_t A_t,

    <W_s, W_t> = scale^2 tr((A_t A_s^T)(B_s^T B_t)) = scale^2 sum((A_s A_t^T) * (B_s^T B_t)),

r x r blocks of the two Gram matrices of all rows of A and all columns of B: the dense product is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from zopro.analysis.reading.parts import FACTORS, PRODUCT, Factors, Part
from zopro.analysis.reading.streaming import Points, Sums, ahead, edges_of, piece_size, refuse_not_finite

BLOCK = 4096  # columns converted to float64 and multiplied at a time, shared out among the ranks
PAIR_BYTES = 256 << 20  # of the two (checkpoints * r)^2 matrices before they are computed in groups of checkpoints


@np.errstate(invalid="ignore", over="ignore")  # what is not finite is refused by name
def add_factored(index: int, part: Part, points: Points, views: dict[str, Sums]) -> None:
    """LoRA pairs: both views from one reading of A [r, in] and B [out, r]."""
    pairs = [row for row in part.rows if isinstance(row, Factors)]
    ranks = np.array([pair.rank for pair in pairs])
    offsets = np.concatenate([[0], np.cumsum(ranks)[:-1]])
    product, factors = views[PRODUCT], views.get(FACTORS)
    wide = int(ranks.sum())
    groups = max(1, -(-(2 * 8 * wide * wide) // PAIR_BYTES))
    size = pairs[0].size
    wanted = product.wanted[index]
    rows_wanted, columns_wanted = wanted // size[1], wanted % size[1]
    full = np.zeros((len(pairs), len(pairs)))
    for group in np.array_split(np.arange(len(pairs)), min(groups, len(pairs))):
        first_time = group[0] == 0
        lines = slice(int(offsets[group[0]]), int(offsets[group[-1]] + ranks[group[-1]]))
        keep = factors if first_time else None
        a = _side(index, pairs, "a", lines, points, keep, columns_wanted if first_time else None)
        b = _side(index, pairs, "b", lines, points, keep, rows_wanted if first_time else None)
        blocks = a.gram * b.gram  # [lines of the group, lines of all]
        inner = np.add.reduceat(np.add.reduceat(blocks, offsets[group] - lines.start, 0), offsets, 1)
        full[group] = inner
        if first_time:
            sums = np.add.reduceat(a.sums * b.sums, offsets)
            values = np.add.reduceat(a.values * b.values, offsets, 0)
    scale = np.array([pair.scale for pair in pairs])
    move = points.displacement
    product.add(index, move @ (full * np.outer(scale, scale)) @ move.T, move @ (scale * sums))
    product.keep(index, move @ (scale[:, None] * values))


@dataclass(frozen=True)
class _Side:
    gram: np.ndarray  # [lines, all lines], a line is one row of A or column of B of one checkpoint
    sums: np.ndarray  # [all lines]
    values: np.ndarray  # [all lines, k]


def _side(
    index: int,
    pairs: Sequence[Factors],
    side: str,
    lines: slice,
    points: Points,
    factors: Sums | None,
    wanted: np.ndarray | None,
) -> _Side:
    """Inner products of the lines of one factor; with `factors` also the piece's share in the factors view."""
    stored = [getattr(pair, side) for pair in pairs]
    wide = sum(pair.rank for pair in pairs)
    width = pairs[0].size[1] if side == "a" else pairs[0].size[0]
    offset = 0 if side == "a" else pairs[0].a.numel
    gram, sums = np.zeros((lines.stop - lines.start, wide)), np.zeros(wide)
    values = np.zeros((wide, 0 if wanted is None else len(wanted)))
    size = piece_size(max(s.dtype.itemsize for s in stored) * wide)
    edges = list(edges_of(width, size))
    jobs = ((lambda first=first, last=last: _lines(pairs, side, first, last)) for first, last in edges)
    for (first, last), raw in zip(edges, ahead(jobs), strict=True):
        for a, b in edges_of(last - first, max(1, BLOCK * len(pairs) // wide)):
            rows = np.concatenate([piece[:, a:b].double().numpy() for piece in raw])  # [all lines, b - a]
            if points.reward_ema < 1:
                averages = rows[sum(pair.rank for pair in pairs[: points.policy]) :]
                points.take_apart(averages.reshape(points.total - points.policy, -1, b - a))
            gram += rows[lines] @ rows.T if len(gram) < wide else rows @ rows.T
            sums += rows.sum(1)
            if wanted is not None:
                here = np.flatnonzero((wanted >= first + a) & (wanted < first + b))
                values[:, here] = rows[:, wanted[here] - first - a]
            if factors is not None:  # displacements change a copy: the product needs the lines as they are
                _add_factors(index, rows, points, factors, (side, first + a, first + b, width, offset))
        refuse_not_finite(gram, raw, stored)
    return _Side(gram, sums, values)


def _add_factors(
    index: int, lines: np.ndarray, points: Points, factors: Sums, where: tuple[str, int, int, int, int]
) -> None:
    side, first, last, width, offset = where
    rank = len(lines) // points.total
    rows = points.displace(lines.reshape(points.total, -1).copy())
    factors.add(index, rows @ rows.T, rows.sum(1))
    # Where this block's coordinates lie among those of the factor: A is [r, in], B is [out, r].
    at = np.arange(first, last)
    places = np.arange(rank)[:, None] * width + at if side == "a" else at * rank + np.arange(rank)[:, None]
    mask = np.isin(places.ravel() + offset, factors.wanted[index], assume_unique=True)
    factors.keep(index, rows[:, mask])


def _lines(pairs: Sequence[Factors], side: str, first: int, last: int) -> list[Tensor]:
    """For every checkpoint [r, last - first]: columns of A, or rows of B transposed."""
    if side == "a":
        return [pair.a.columns(first, last) for pair in pairs]
    return [pair.b.flat(first * pair.rank, last * pair.rank).view(-1, pair.rank).T for pair in pairs]
