"""What reading in pieces needs: the rows there are, the sums that grow, and the pieces themselves."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from zopro.analysis.reading.parts import FACTORS, Part
from zopro.errors import InputError
from zopro.weights.tensors import Stored

PIECE_BYTES = 32 << 20  # read at a time, of all checkpoints together; each of a few threads holds one
BLOCK_BYTES = 1 << 20  # displaced and multiplied at a time: they stay in a core's cache

T = TypeVar("T")


@dataclass(frozen=True)
class Points:
    """Which rows there are: `policy` checkpoints, then the reward model's; `main` begin or end an iteration.

    reward_ema: weight of the newest in the reward model's checkpoints; below 1 they are moving averages.
    """

    policy: int
    total: int
    main: tuple[int, ...]
    reward_ema: float = 1.0

    def take_apart(self, averages: np.ndarray) -> None:
        """Make of the reward model's averages E_t, in place, R_t = E_t + (1 / w - 1) (E_t - E_{t-1}).

        Of what is stored: a product of averaged factors is no average of products.
        """
        if self.reward_ema < 1:
            averages[1:] += (1 / self.reward_ema - 1) * np.diff(averages, axis=0)

    def displace(self, rows: np.ndarray) -> np.ndarray:
        """Subtract each trajectory's first row from its rows, in place."""
        for side in filter(len, (rows[: self.policy], rows[self.policy :])):
            side -= side[0].copy()
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


class Sums:
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
        """All of it. Raises `InputError` for finite numbers whose products are not."""
        if not np.isfinite(self.total).all():
            infinite = (
                part.name for part, gram in zip(self.parts, self.gram, strict=True) if not np.isfinite(gram).all()
            )
            name = next(infinite, "weights")
            raise InputError(
                f"{name}: must be of numbers whose squares are finite, got larger ones. Leave that checkpoint out."
            )
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


def piece_size(bytes_each: int) -> int:
    """How many columns fit in a piece."""
    return max(1, PIECE_BYTES // bytes_each)


def edges_of(length: int, size: int) -> Iterator[tuple[int, int]]:
    for first in range(0, length, size):
        yield first, min(length, first + size)


def ahead(jobs: Iterable[Callable[[], T]], workers: int = 1) -> Iterator[T]:
    """The jobs' results in order; the next ones are worked out by so many threads while one is used."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[T]] = deque()
        for job in jobs:
            done = pending.popleft().result() if len(pending) == workers else None
            pending.append(pool.submit(job))
            if done is not None:
                yield done
                del done
        while pending:
            yield pending.popleft().result()


def block_size(bytes_each: int) -> int:
    """How many columns fit in a block."""
    return max(1, BLOCK_BYTES // bytes_each)


def refuse_not_finite(gram: np.ndarray, raw: Sequence[Tensor], stored: Sequence[Stored]) -> None:
    """Refuse NaN and infinity, with the file that holds them; a Gram matrix shows them all."""
    if np.isfinite(gram).all():
        return
    for piece, source in zip(raw, stored, strict=True):
        if not torch.isfinite(piece.double()).all():
            raise InputError(f"{source.path}: must hold finite numbers, but '{source.name}' has NaN or infinity.")
