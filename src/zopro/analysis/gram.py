"""Exact Gram matrices of two trajectories in one pass over their files, one tensor at a time, a piece at a time.

Everything the analysis says is a function of inner products between checkpoints. For weights x_0 ... x_n of a trajectory
the rows are the displacements x_t - x_0 from its own start; for every tensor

    G[s, t] = <x_s - x_0, x_t - x_0>        [P, P], policy rows first, then the reward model's

so that layers, modules and the whole are sums. In the product view of LoRA, with W_t = scale B_t A_t,

    <W_s, W_t> = scale^2 tr((A_t A_s^T)(B_s^T B_t)) = scale^2 sum((A_s A_t^T) * (B_s^T B_t))

from r x r blocks: the dense product is never formed. All sums are in float64; memory is a fixed piece of the rows, the
Gram matrices themselves and, in the product view, (checkpoints * r)^2 numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zopro.analysis.parts import FACTORS, PRODUCT, Factors, Pairing, Part
from zopro.analysis.tensors import Stored, read_rows
from zopro.errors import InputError

PIECE_BYTES = 32 << 20  # read at a time, of all checkpoints together; up to three pieces are held (one is read ahead)
BLOCK = 4096  # columns converted to float64 and multiplied at a time: they stay in the cache
PAIR_BYTES = 256 << 20  # of the two (checkpoints * r)^2 matrices of a product before they are computed in groups of rows

T = TypeVar("T")


@dataclass(frozen=True)
class Points:
    """Which rows there are: `policy` checkpoints, then the reward model's; `main` begin or end an iteration."""

    policy: int
    total: int
    main: tuple[int, ...]

    def displace(self, rows: np.ndarray) -> np.ndarray:
        """Subtract each trajectory's first row from its rows, in place."""
        rows[: self.policy] -= rows[0].copy()
        rows[self.policy :] -= rows[self.policy].copy()
        return rows

    @property
    def displacement(self) -> np.ndarray:
        """[total, total]: the same as a matrix."""
        return self.displace(np.eye(self.total))


@dataclass(frozen=True)
class Grams:
    """One view's inner products. P main rows, Q rows with snapshots, n parts, k sampled coordinates."""

    view: str
    parts: tuple[Part, ...]
    counts: np.ndarray  # [n] coordinates
    gram: np.ndarray  # [n, P, P]
    sums: np.ndarray  # [n, P] <x_t - x_0, 1>
    total: np.ndarray  # [Q, Q]
    coordinates: np.ndarray  # [P, k]

    @property
    def dimension(self) -> int:
        return int(self.counts.sum())


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
    sums = {view: _Sums(view, pairing.parts, points, coordinates, seed) for view in pairing.views}
    with np.errstate(invalid="ignore", over="ignore"):  # what is not finite is refused below, by name
        for index, part in enumerate(pairing.parts):
            kinds = {type(row) for row in part.rows}
            if kinds == {Stored}:
                _dense(index, part, points, list(sums.values()))
            elif kinds == {Factors}:
                _factored(index, part, points, sums)
            else:
                _mixed(index, part, points, sums[PRODUCT])
    return {view: found.result() for view, found in sums.items()}


class _Sums:
    """What is accumulated of one view."""

    def __init__(self, view: str, parts: tuple[Part, ...], points: Points, coordinates: int, seed: int) -> None:
        self.view, self.parts, self.points = view, parts, points
        self.counts = np.array([part.stored_numel if view == FACTORS else part.numel for part in parts])
        main = len(points.main)
        self.gram, self.sums = np.zeros((len(parts), main, main)), np.zeros((len(parts), main))
        self.total = np.zeros((points.total, points.total))
        self.wanted = _sample(self.counts, coordinates, seed)
        self.found: list[list[np.ndarray]] = [[] for _ in parts]

    def add(self, index: int, gram: np.ndarray, sums: np.ndarray) -> None:
        main = list(self.points.main)
        self.gram[index] += gram[np.ix_(main, main)]
        self.sums[index] += sums[main]
        self.total += gram

    def keep(self, index: int, values: np.ndarray) -> None:
        """Values [Q, some] of the wanted coordinates, in their order."""
        self.found[index].append(values[list(self.points.main)])

    def inside(self, index: int, first: int, last: int) -> np.ndarray:
        """Which wanted coordinates of a part lie in [first, last), counted from `first`."""
        wanted = self.wanted[index]
        low, high = np.searchsorted(wanted, [first, last])
        return wanted[low:high] - first

    def result(self) -> Grams:
        values = [piece for pieces in self.found for piece in pieces]
        coordinates = np.concatenate(values, 1) if values else np.zeros((len(self.points.main), 0))
        return Grams(self.view, self.parts, self.counts, self.gram, self.sums, self.total, coordinates)


def _sample(counts: np.ndarray, size: int, seed: int) -> list[np.ndarray]:
    """Sorted coordinates of every part, together a uniform sample without repetition."""
    generator, left = np.random.default_rng(seed), int(counts.sum())
    size = min(size, left)
    chosen = []
    for count in counts.tolist():
        # A part's share of a uniform sample is hypergeometric; numpy's generator takes at most 1e9 of either kind.
        share = size / left if left else 0.0
        if left - count < 1_000_000_000 and count < 1_000_000_000:
            mine = int(generator.hypergeometric(count, left - count, size)) if size else 0
        else:
            mine = int(min(size, count, generator.binomial(size, count / left))) if size and share else 0
        chosen.append(np.sort(generator.choice(count, mine, replace=False, shuffle=False)))
        left, size = left - count, size - mine
    return chosen


def _dense(index: int, part: Part, points: Points, views: Sequence[_Sums]) -> None:
    """Tensors compared as they are stored, [Q, numel] in pieces."""
    stored = [row for row in part.rows if isinstance(row, Stored)]
    edges = list(_edges(stored[0].numel, _piece(sum(one.dtype.itemsize for one in stored))))
    jobs = ((lambda a=a, b=b: read_rows(stored, a, b)) for a, b in edges)
    for (first, _), raw in zip(edges, _ahead(jobs), strict=True):
        gram, sums = _displaced(raw, points, views, index, first)
        _finite(gram, raw, stored)
        for view in views:
            view.add(index, gram, sums)


def _displaced(
    raw: Sequence[Tensor], points: Points, views: Sequence[_Sums], index: int, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """Gram matrix and sums of the displacements of a piece, in blocks; sampled coordinates are kept on the way."""
    gram, sums = np.zeros((len(raw), len(raw))), np.zeros(len(raw))
    for a, b in _edges(len(raw[0]), BLOCK):
        block = raw[:, a:b] if isinstance(raw, Tensor) else torch.stack([piece[a:b].double() for piece in raw])
        rows = points.displace(block.double().numpy())
        gram += rows @ rows.T
        sums += rows.sum(1)
        for view in views:
            view.keep(index, rows[:, view.inside(index, first + a, first + b)])
    return gram, sums


def _factored(index: int, part: Part, points: Points, views: dict[str, _Sums]) -> None:
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
    factors: _Sums | None,
    wanted: np.ndarray | None,
) -> _Side:
    """Inner products of the lines of one factor; with `factors` also the piece's share in the factors view."""
    stored = [getattr(pair, side) for pair in pairs]
    wide = sum(pair.rank for pair in pairs)
    width = pairs[0].size[1] if side == "a" else pairs[0].size[0]
    offset = 0 if side == "a" else pairs[0].a.numel
    gram, sums = np.zeros((lines.stop - lines.start, wide)), np.zeros(wide)
    values = np.zeros((wide, 0 if wanted is None else len(wanted)))
    size = _piece(max(s.dtype.itemsize for s in stored) * wide)
    edges = list(_edges(width, size))
    jobs = ((lambda first=first, last=last: _lines(pairs, side, first, last)) for first, last in edges)
    for (first, last), raw in zip(edges, _ahead(jobs), strict=True):
        for a, b in _edges(last - first, max(1, BLOCK * len(pairs) // wide)):
            rows = np.concatenate([piece[:, a:b].double().numpy() for piece in raw])  # [all lines, b - a]
            gram += rows[lines] @ rows.T if len(gram) < wide else rows @ rows.T
            sums += rows.sum(1)
            if wanted is not None:
                here = np.flatnonzero((wanted >= first + a) & (wanted < first + b))
                values[:, here] = rows[:, wanted[here] - first - a]
            if factors is not None:  # displacements change a copy: the product needs the lines as they are
                _add_factors(index, rows, points, factors, (side, first + a, first + b, width, offset))
        _finite(gram, raw, stored)
    return _Side(gram, sums, values)


def _add_factors(
    index: int, lines: np.ndarray, points: Points, factors: _Sums, where: tuple[str, int, int, int, int]
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


def _mixed(index: int, part: Part, points: Points, view: _Sums) -> None:
    """A policy of whole weights against a LoRA reward model: rows of the product are formed piece by piece."""
    first_size = next(row.shape for row in part.rows if isinstance(row, Stored))
    width = part.numel // first_size[0]
    for first, last in _edges(first_size[0], max(1, _piece(4 * len(part.rows) * width))):
        raw = [_weight_rows(row, first, last).flatten() for row in part.rows]
        gram, sums = _displaced(raw, points, [view], index, first * width)
        _finite(gram, raw, [row if isinstance(row, Stored) else row.a for row in part.rows])
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


def _piece(bytes_each: int) -> int:
    """How many columns fit in a piece."""
    return max(1, PIECE_BYTES // bytes_each)


def _edges(length: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, size):
        yield first, min(length, first + size)


def _ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """The jobs' results in order, the next one worked out (by a thread: they read files) while this one is used."""
    iterator = iter(jobs)
    with ThreadPoolExecutor(1) as pool:
        first = next(iterator, None)
        pending = pool.submit(first) if first else None
        while pending is not None:
            result = pending.result()
            following = next(iterator, None)
            pending = pool.submit(following) if following else None
            yield result
            del result


def _finite(gram: np.ndarray, raw: Sequence[Tensor], stored: Sequence[Stored]) -> None:
    """Refuse NaN and infinity, with the file that holds them; a Gram matrix shows them all."""
    if np.isfinite(gram).all():
        return
    for piece, source in zip(raw, stored, strict=True):
        if not torch.isfinite(piece.double()).all():
            raise InputError(f"{source.path}: must hold finite numbers, but '{source.name}' has NaN or infinity.")
