"""Prompts that begin alike, such as by a chat template's system message: each displaced policy reads the beginning once.

Rows of one prompt share all of it already (`zopro.engine.local.reading`). Different prompts share their beginning, and a
population reads every prompt once for each member: 32 members on 8 short questions behind a system message of 28 tokens
read 3968 tokens this way, and 10240 without. What was read stands before each row's own end, and padding between the two:

    beginning | padding | rest of the prompt

Attention by mask and position does not see the padding. Windows count it, so layers with windows or states do without,
and what else a model may do with it is found out by trying it once (`zopro.engine.local.abilities.reads_prefixes`).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from zopro.engine.local.causal import Decoder, positions
from zopro.engine.local.members import Members
from zopro.engine.local.shared import select_rows

LEAST_SAVED = 256  # tokens; for fewer a second pass does not pay

Owners = tuple[Members, Tensor]  # the members, and which of them each row belongs to, (n,) int64


def common_prefix(ids: Tensor, mask: Tensor) -> int:
    """Tokens that all rows (n, P), padded on the left, begin with; at least one of each row is left.

    >>> ids, mask = torch.tensor([[0, 5, 6, 7], [5, 6, 8, 9]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    >>> common_prefix(ids, mask)
    2
    """
    most = int(mask.sum(-1).min()) - 1
    if most < 1:
        return 0
    begins = _beginnings(ids, mask, most)
    return int((begins == begins[:1]).all(0).long().cumprod(0).sum())


def worth_sharing(ids: Tensor, mask: Tensor, owners: Owners) -> int:
    """Tokens of the rows' beginning that each owner is to read once; 0 where that does not pay."""
    prefix = common_prefix(ids, mask)
    saved = prefix * (len(ids) - len(owners[1].unique()))
    return prefix if saved >= LEAST_SAVED else 0


def read_prompts(
    parts: Decoder,
    ids: Tensor,
    mask: Tensor,
    copies: int,
    cache: DynamicCache | None,
    owners: Owners | None = None,
    prefix: int = 0,
) -> tuple[Tensor, Tensor]:
    """Read prompts (n, P), padded on the left, once each; each then goes on `copies` times.

    Args:
        cache: an empty one, which gets what is read; None keeps nothing.
        owners: the displaced policy of each prompt, where there are several; afterwards they read all n * K rows.
        prefix: tokens that all prompts begin with, for each owner to read once, into the cache.

    Returns:
        Hidden states (n * K, H) of the prompts' last tokens, and the mask (n, P) of the columns read.
    """
    members, owner = owners or (None, torch.zeros(len(ids), dtype=torch.long, device=ids.device))
    if prefix:
        groups, group = owner.unique(return_inverse=True)
        begin = _beginnings(ids[:1], mask[:1], prefix).expand(len(groups), -1)
        if members is not None:
            members.choose(groups)
        parts.hidden(begin, torch.ones_like(begin), torch.arange(prefix, device=ids.device).expand_as(begin), cache)
        assert cache is not None
        select_rows(cache, group)
        rest = torch.arange(ids.shape[1] - prefix, 0, -1, device=ids.device) <= mask.sum(-1, keepdim=True) - prefix
        mask = torch.cat([mask.new_ones(len(ids), prefix), rest.to(mask.dtype)], dim=1)
    if members is not None:
        members.choose(owner)
    where = positions(mask)[:, prefix:]
    hidden = parts.hidden(ids[:, prefix:], mask, where, cache)[:, -1]
    if members is not None:
        members.choose(owner.repeat_interleave(copies))
    return hidden.repeat_interleave(copies, dim=0), mask


def _beginnings(ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """(n, count), the first tokens of each row that is padded on the left."""
    first = ids.shape[1] - mask.sum(-1, keepdim=True)
    return ids.gather(1, first + torch.arange(count, device=ids.device))
