"""Where decoding stands, at addresses that stay: memory for so many rows, steps and cells, and views of buckets."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from zopro.engine.gpu.cache import Blocks
from zopro.engine.gpu.step import State

LEAST_COLUMNS = 64  # of a bucket of lengths; multiples of 8 suit the kernels' alignment


def bucket(size: int, least: int = 1) -> int:
    """The smallest of 2^k and 3 * 2^k, from `least` on, that holds `size`: at most a third of it is idle.

    >>> [bucket(size) for size in (1, 5, 9, 13, 17, 33)], bucket(70, least=64)
    ([1, 6, 12, 16, 24, 48], 96)
    """
    while least < size:
        least = least * 3 // 2 if least & (least - 1) == 0 and least > 1 else -(-least * 4 // 3)
    return least


def reaching(end: int) -> int:
    """The bucket of lengths in which columns up to `end` are seen."""
    return bucket(end, LEAST_COLUMNS)


@dataclass(frozen=True)
class Shape:
    """Of one batch: R rows and the columns of its cache; C steps."""

    rows: int
    columns: int
    steps: int

    @classmethod
    def of(cls, rows: int, prompt: int, steps: int) -> Shape:
        """For prompts of so many columns; the last token drawn is not read."""
        cells = -(-(prompt + steps - 1) // LEAST_COLUMNS) * LEAST_COLUMNS
        return cls(rows, cells, steps)


class Memory:
    """Everything that a `State` views, for batches up to this size.

    Args:
        prompts: a cache of the kind to come.
        shape: of the batch that needs it.
        device: of it all.
        before: memory that was too small; this one is in no way smaller.
    """

    def __init__(
        self, prompts: DynamicCache, shape: Shape, device: torch.device, before: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        self.rows = max(before[0], shape.rows)
        self.steps = max(before[1], shape.steps)
        self.cells = max(before[2], shape.rows * shape.columns)
        self.column, self.step = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))
        self.blocks = Blocks(prompts, self.cells, self.column)
        self._mask = torch.ones(self.cells, dtype=torch.bool, device=device)
        self._token, self._position, self._row = (
            torch.zeros(self.rows, dtype=torch.long, device=device) for _ in range(3)
        )
        self._alive = torch.ones(self.rows, dtype=torch.bool, device=device)
        results = self.rows + 1, self.steps  # the last row is for slots that nobody needs
        self.uniform = torch.zeros(results, dtype=torch.float64, device=device)
        self.tokens = torch.zeros(results, dtype=torch.long, device=device)
        self.scores = torch.zeros(results, device=device)
        self.counts = torch.zeros(results[0], dtype=torch.long, device=device)

    @property
    def size(self) -> tuple[int, int, int]:
        return self.rows, self.steps, self.cells

    def fits(self, prompts: DynamicCache, shape: Shape) -> bool:
        small = shape.rows <= self.rows and shape.steps <= self.steps
        return small and self.blocks.fits(prompts, shape.rows * shape.columns)

    def begin(self, prompts: DynamicCache, mask: Tensor, copies: int, uniform: Tensor, shape: Shape, pad: int) -> None:
        """Stand behind prompts, read into a cache, with `mask` (n, P), of which each goes on `copies` times."""
        rows, width = shape.rows, mask.shape[1]
        self.blocks.fill(prompts, copies, rows, shape.columns, width)
        seen = self._mask_of(rows, shape.columns)
        seen.fill_(True)
        seen[:, :width] = mask.bool().repeat_interleave(copies, dim=0)
        self.column.fill_(width)
        self.step.zero_()
        self._position[:rows] = mask.sum(-1).repeat_interleave(copies)
        self._row[:rows] = torch.arange(rows, device=mask.device)
        self._alive[:rows] = True
        self.uniform[:rows, : shape.steps] = uniform
        for result, empty in ((self.tokens, pad), (self.scores, 0), (self.counts, 0)):
            result.fill_(empty)

    def _mask_of(self, rows: int, columns: int) -> Tensor:
        return self._mask[: rows * columns].view(rows, columns)

    def state(self, rows: int, columns: int, seen: int) -> State:
        """The first `rows` rows, reading the first `seen` of a batch's columns."""
        return State(
            cache=self.blocks.cache(rows, columns, seen),
            mask=self._mask_of(rows, columns)[:, :seen],
            token=self._token[:rows],
            position=self._position[:rows],
            alive=self._alive[:rows],
            row=self._row[:rows],
            column=self.column,
            step=self.step,
            uniform=self.uniform,
            tokens=self.tokens,
            scores=self.scores,
            counts=self.counts,
        )

    def living(self, rows: int) -> Tensor:
        """Which of the first `rows` rows have not ended; the host waits for it."""
        return self._alive[:rows].nonzero()[:, 0]

    def keep(self, living: Tensor, before: int, after: int, columns: int, end: int) -> None:
        """Move living rows of `before` to the front of `after`, where the rest stands idle. `end`: columns read."""
        order = torch.cat([living, living[:1].expand(after - len(living))])
        self.blocks.keep(order, before, columns, end)
        for held in (self._token, self._position, self._alive, self._row):
            held[:after] = held[:before][order]
        self._mask_of(after, columns).copy_(self._mask_of(before, columns)[order])
        self._alive[len(living) : after] = False
        self._row[len(living) : after] = self.rows
