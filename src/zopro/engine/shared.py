"""K completions of one prompt: the prompt goes through the network once, its keys and values serve all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor
from transformers import DynamicCache

from zopro.engine.causal import Decoder, positions

Select = Callable[[Tensor], Tensor]  # hidden states (rows, T, H) of a pass -> those of them that the caller gets


@contextmanager
def unwatched(select: Select) -> Iterator[None]:
    """Around a pass that nobody watches."""
    yield


def hidden_shared(
    parts: Decoder,
    ids: Tensor,
    mask: Tensor,
    split: int,
    copies: int,
    passing: Callable[[Select], AbstractContextManager[None]] = unwatched,
) -> Tensor:
    """Hidden states (B, T - split + 1, H) of each prompt's last token and of every token after it.

    Args:
        parts: the model.
        ids: (B, T): prompts padded on the left in the first `split` columns, completions padded on the right.
        mask: (B, T): 1 on real tokens.
        split: columns of the prompts.
        copies: K; each K consecutive rows have the same prompt.
        passing: entered around each pass of the network, with what is selected of its states.

    Raises:
        ValueError: rows that should share a prompt do not.
    """
    for tensor in (ids, mask):
        groups = tensor[:, :split].unflatten(0, (-1, copies))  # (B / K, K, P)
        if not torch.equal(groups, groups[:, :1].expand_as(groups)):
            raise ValueError(f"num_generations: each {copies} consecutive rows must have the same prompt.")
    where = positions(mask)
    cache = DynamicCache(config=parts.model.config)
    with passing(lambda states: states[:, -1:].repeat_interleave(copies, dim=0)):
        prompt = parts.hidden(ids[::copies, :split], mask[::copies, :split], where[::copies, :split], cache)
    last = prompt[:, -1:].repeat_interleave(copies, dim=0)
    if ids.shape[1] == split:
        return last
    select_rows(cache, torch.arange(len(ids), device=ids.device) // copies)
    with passing(lambda states: states):
        rest = parts.hidden(ids[:, split:], mask, where[:, split:], cache)
    return torch.cat([last, rest], dim=1)


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Make the cache's batch the given rows of it, repeated or left out as `rows` (int64) says; differentiable."""
    cache.reorder_cache(rows)  # the one operation of this kind that every cache layer has, recurrent ones included
