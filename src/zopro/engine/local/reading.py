"""What rows have read so far, one token after another: kept in a cache, or read again where no cache is right."""

from __future__ import annotations

import torch
from torch import Tensor

from zopro.engine.local.causal import Decoder, positions
from zopro.engine.local.growing import growing_cache
from zopro.engine.local.prefix import Owners, read_prompts
from zopro.engine.local.shared import select_rows


class Cached:
    """Prompts read once for all their continuations, and every later token once; without a graph.

    Args:
        parts: the model.
        ids: (n, P) prompts, padded on the left.
        mask: (n, P): 1 on real tokens.
        copies: K continuations of each.
        owners: the displaced policy of each prompt, where there are several.
        prefix: tokens that all prompts begin with, for each owner to read once.

    Attributes:
        hidden: (rows, H) of the last token read; n * K rows until some are left out.
    """

    def __init__(
        self, parts: Decoder, ids: Tensor, mask: Tensor, copies: int, owners: Owners | None = None, prefix: int = 0
    ) -> None:
        self.parts = parts
        self._cache = growing_cache(parts.model.config)
        self.hidden, mask = read_prompts(parts, ids, mask, copies, self._cache, owners, prefix)
        select_rows(self._cache, torch.arange(len(ids) * copies, device=ids.device) // copies)
        self._next = mask.sum(-1).repeat_interleave(copies)  # (rows,) position of the next token
        self._seen = None if bool(mask.all()) else mask.repeat_interleave(copies, dim=0)

    def select(self, rows: Tensor) -> None:
        """Leave out all rows but these (int64)."""
        select_rows(self._cache, rows)
        self._next = self._next[rows]
        self._seen = None if self._seen is None else self._seen[rows]

    def read(self, token: Tensor) -> None:
        """Read one more token (rows,) in each row."""
        if self._seen is not None:
            self._seen = torch.cat([self._seen, self._seen.new_ones(len(token), 1)], dim=1)
        self.hidden = self.parts.hidden(token[:, None], self._seen, self._next[:, None], self._cache)[:, -1]
        self._next = self._next + 1


class Recomputed:
    """`Cached`, for an architecture whose cache is not right: every token is read again with each new one."""

    def __init__(self, parts: Decoder, ids: Tensor, mask: Tensor, copies: int, owners: Owners | None = None) -> None:
        self.parts = parts
        self.hidden, _ = read_prompts(parts, ids, mask, copies, None, owners)
        self._ids, self._mask = ids.repeat_interleave(copies, dim=0), mask.repeat_interleave(copies, dim=0)

    def select(self, rows: Tensor) -> None:
        self._ids, self._mask = self._ids[rows], self._mask[rows]

    def read(self, token: Tensor) -> None:
        self._ids = torch.cat([self._ids, token[:, None]], dim=1)
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(token), 1)], dim=1)
        self.hidden = self.parts.hidden(self._ids, self._mask, positions(self._mask), None)[:, -1]
