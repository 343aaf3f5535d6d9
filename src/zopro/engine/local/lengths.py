"""Rows of about the same length go through the network together, so that little of a pass is padding.

Packing rows end to end behind a block mask computes no padding at all, but every token then attends over the whole pack,
and architectures with recurrent states, soft caps or a mask of their own cannot be packed. Passes over rows of about the
same length compute a few per cent more tokens than that, and run whatever runs padded (docs/lab/gpu.md has the counts).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

LEVELS = 64  # different lengths that are looked at; more are rounded up

# Tokens that one more pass costs beside its own: it waits for some thousand kernel launches. Chosen by arithmetic, not
# measured (docs/gpu.md). Elsewhere all rows go together: other passes round otherwise, and runs stay bit-equal.
PASS = {"cuda": 2048, "mps": 512}


def pass_cost(device: torch.device) -> int | None:
    """Tokens that a pass costs beside its own, on this kind of device; None: all rows go together."""
    return PASS.get(device.type)


def by_length(lengths: Sequence[int], cost: int | None) -> list[list[int]]:
    """Rows (their numbers, ascending) in the groups that compute the fewest tokens, padded each to its longest row.

    Rows of the same length are in the same group.

    Args:
        lengths: tokens of each row.
        cost: tokens that a group costs beside its own; None: one group.

    >>> by_length([100, 3, 4, 100, 0], cost=10), by_length([100, 3, 4, 100, 0], cost=1000)
    ([[0, 3], [1, 2, 4]], [[0, 1, 2, 3, 4]])
    """
    if cost is None or len(lengths) < 2:
        return [list(range(len(lengths)))]
    step = -(-max(lengths) // LEVELS) or 1

    def level(row: int) -> int:
        return -(-lengths[row] // step)

    ranked = sorted(range(len(lengths)), key=lambda row: -level(row))
    levels = [list(rows) for _, rows in groupby(ranked, key=level)]  # from the longest
    best: list[tuple[int, int]] = [(0, 0)]  # least tokens of the first levels, and where their last group begins
    for end in range(1, len(levels) + 1):
        rows, found = 0, []
        for first in range(end - 1, -1, -1):
            rows += len(levels[first])
            longest = max(lengths[row] for row in levels[first])
            found.append((best[first][0] + cost + rows * longest, first))
        best.append(min(found))
    groups, end = [], len(levels)
    while end:
        first = best[end][1]
        groups.append(sorted(row for rows in levels[first:end] for row in rows))
        end = first
    return groups[::-1]
