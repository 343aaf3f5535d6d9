"""How the next token is drawn from logits: by inverting the distribution function, with one uniform number a token.

Gumbel-max draws from the same distribution, but its V random numbers a token took longer than the output matrix of a
262144-token vocabulary (0.20 s against 0.18 s a step of 32 rows on two cores); and one number a token can be assigned
to its row beforehand, so that what a row becomes does not depend on how the rows are batched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from zopro.engine.local.causal import CausalParts
from zopro.engine.local.head import exponentiate_, limits
from zopro.errors import InputError
from zopro.zo.groups import number

BLOCK = 512  # tokens summed before the distribution function is searched
BELOW_ONE = {torch.float64: 1 - 1e-12, torch.float32: 1 - 2**-23}  # times any sum, it is below it
FIRST_CANDIDATES = 256  # most likely tokens looked at first when the truncation's size is not known


@dataclass(frozen=True)
class Sampler:
    """How the next token is drawn from logits."""

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float

    def __post_init__(self) -> None:
        whole = isinstance(self.top_k, Integral)
        for name, ok, rule in (
            ("temperature", number(self.temperature) > 0, "must be above 0, for greedy answers (do_sample=False) too"),
            ("top_k", self.top_k is None or (whole and self.top_k > 0), "must be a whole number of at least 1, or None"),
            ("top_p", 0 < number(self.top_p) <= 1, "must lie in (0, 1]"),
            ("min_p", 0 <= number(self.min_p) <= 1, "must lie in [0, 1]"),
        ):
            if not ok:
                raise InputError(f"{name}: {rule}, got {getattr(self, name)!r}.")

    def draw(self, logits: Tensor, uniform: Tensor, on_host: bool = True) -> tuple[Tensor, Tensor]:
        """Tokens and their log-probs, each (rows,), of fp32 logits (rows, V), which are overwritten.

        `on_host`: the host may look at values to spare work; the same tokens either way.
        """
        if not self.do_sample:
            best = most_likely(logits)
            return best, -exponentiate_(logits, self.temperature)[1].log()
        _, total = exponentiate_(logits, self.temperature)
        if self.top_k is None and self.top_p == 1 and self.min_p == 0:
            token = sample_blocked(logits, uniform)
        else:
            token = sample_truncated(logits, total, uniform, self.top_k, self.top_p, self.min_p, on_host)
        return token, logits.gather(-1, token[:, None])[:, 0].log() - total.log()


def next_tokens(
    parts: CausalParts, sampler: Sampler, hidden: Tensor, uniform: Tensor, on_host: bool = True
) -> tuple[Tensor, Tensor]:
    """Tokens and their log-probs, each (rows,), after hidden states (rows, H), some rows' logits at a time."""
    chunk = max(1, limits(hidden.device).elements // parts.config.vocab_size)
    drawn = [
        sampler.draw(parts.logits(rows), numbers, on_host)
        for rows, numbers in zip(hidden.contiguous().split(chunk), uniform.split(chunk), strict=True)
    ]
    return torch.cat([token for token, _ in drawn]), torch.cat([score for _, score in drawn])


def invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Index i with probability weights_i / sum, and where in i's interval the number fell: a fresh uniform number.

    >>> index, rest = invert(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([0.625], dtype=torch.float64))
    >>> index.tolist(), rest.tolist()
    ([2], [0.5])
    """
    weights = weights.to(uniform.dtype)
    cumulative = weights.cumsum(-1)
    target = uniform.clamp(max=BELOW_ONE[uniform.dtype])[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[-1] - 1)
    weight = weights.gather(-1, index)
    rest = (target - cumulative.gather(-1, index) + weight) / weight
    return index[:, 0], rest[:, 0].clamp(0, 1)


def most_likely(logits: Tensor) -> Tensor:
    """`logits.argmax(-1)` of (rows, V), which takes 3 times as long in rows, 24 times in columns."""
    block = _of_blocks(torch.amax, logits).argmax(-1)
    return block * BLOCK + _inside(logits, block, -torch.inf).argmax(-1)


def sample_blocked(weights: Tensor, uniform: Tensor) -> Tensor:
    """Token (rows,) with probability proportional to fp32 weights (rows, V): first its block, then it in the block."""
    block, rest = invert(_of_blocks(torch.sum, weights), uniform)
    token = block * BLOCK + invert(_inside(weights, block, 0.0), rest)[0]
    return token.clamp(max=weights.shape[-1] - 1)  # of NaN, which the caller finds in the log-probs


def _of_blocks(reduce: Callable[..., Tensor], values: Tensor) -> Tensor:
    """A reduction of each BLOCK of tokens, (rows, blocks), of values (rows, V) that lie in memory as rows or columns."""
    whole = values.shape[-1] // BLOCK * BLOCK
    if values.stride(0) == 1:  # the result, too, in columns: rows from columns take twenty times as long
        reduced = reduce(values.T[:whole].unflatten(0, (whole // BLOCK, BLOCK)), dim=1).T
    else:
        reduced = reduce(values[:, :whole].unflatten(-1, (whole // BLOCK, BLOCK)), dim=-1)
    last = [reduce(values[:, whole:], dim=-1, keepdim=True)] if whole < values.shape[-1] else []
    return torch.cat([reduced, *last], dim=-1)


def _inside(values: Tensor, block: Tensor, fill: float) -> Tensor:
    """(rows, BLOCK), each row's values in its block; behind the vocabulary's end `fill`."""
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=values.device)
    last = values.shape[-1] - 1
    return values.gather(-1, columns.clamp(max=last)).masked_fill(columns > last, fill)


def sample_truncated(
    weights: Tensor,
    total: Tensor,
    uniform: Tensor,
    top_k: int | None,
    top_p: float,
    min_p: float,
    on_host: bool = True,
) -> Tensor:
    """Token (rows,) proportional to weights (rows, V) among those that top-k, top-p and min-p leave.

    Only as many of the most likely tokens are sorted as the truncation can keep: sorting 262144 took 30 ms a row on a
    CPU. How many these are is seen `on_host`; without that, all that top-k leaves are sorted.
    """
    vocabulary = weights.shape[-1]
    weights = weights.contiguous()  # `topk` would go through a row's column of memory many times
    most = min(top_k or vocabulary, vocabulary)
    size = most if top_k or not on_host else min(FIRST_CANDIDATES, most)
    while True:
        values, tokens = weights.topk(size, dim=-1)
        mass = values.sum(-1) if top_k else total
        keep = (values.cumsum(-1) - values < top_p * mass[:, None]) & (values >= min_p * values[:, :1])
        if size == most or not keep[:, -1].any():
            break
        size = min(8 * size, most)
    index, _ = invert(values * keep, uniform)
    return tokens.gather(-1, index[:, None])[:, 0]
