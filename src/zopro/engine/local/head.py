"""Log-probs of given tokens, and their gradient, from hidden states and the output matrix: a tile of logits at a time.

A tile is many rows by a block of the vocabulary, so that its product runs at a matrix product's speed; whole rows of a
large vocabulary would make it a product of few rows, bound by reading the weight, at the same memory. Sums over the
vocabulary are carried from block to block relative to the largest logit so far, as in FlashAttention (Dao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zopro.engine.local.causal import CausalParts
from zopro.engine.local.products import is_untouched, times_weight


@dataclass(frozen=True)
class Limits:
    """What to hold at once on a kind of device, in fp32 logits."""

    elements: int  # of whole rows, as decoding takes them
    tile_rows: int
    tile_elements: int


LIMITS = {
    # 32 MiB, 32 rows of a 262144-token vocabulary (docs/performance.md); 8 MiB: larger tiles make a product no faster.
    "cpu": Limits(2**23, 512, 2**21),
    # 128 MiB: a GPU waits between small products. Chosen by arithmetic, not measured (docs/gpu.md).
    "cuda": Limits(2**25, 2048, 2**25),
}


def limits(device: torch.device) -> Limits:
    """For this kind of device."""
    return LIMITS.get(device.type, LIMITS["cpu"])


def tiles(rows: int, vocabulary: int, limit: Limits, max_elements: int | None = None) -> tuple[int, int]:
    """Rows and columns of a tile within `limit`, and of at most `max_elements` logits; at least one.

    >>> tiles(1000, 262144, LIMITS["cpu"]), tiles(1000, 500, LIMITS["cpu"]), tiles(9000, 262144, LIMITS["cuda"])
    ((512, 4096), (1000, 500), (2048, 16384))
    """
    elements = min(max_elements or limit.elements, limit.tile_elements)
    columns = min(vocabulary, max(1, elements // min(rows, limit.tile_rows)))
    return max(1, min(rows, elements // columns)), columns


def is_matrix(head: nn.Module) -> bool:
    """Whether the head is one product with its weight, and nothing looks on."""
    return type(head) is nn.Linear and is_untouched(head)


def score_tokens(
    parts: CausalParts,
    hidden: Tensor,
    picked: Tensor,
    temperature: float,
    *,
    errors: bool = False,
    max_elements: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs (n,) of tokens `picked` (n,) under softmax(logits / T), without a graph.

    Args:
        parts: the model.
        hidden: (n, H), the last hidden states, after the final norm.
        picked: (n,) int64.
        temperature: T.
        errors: also return the gradient of each log-prob with respect to its hidden states, (onehot - softmax) W / T in
            closed form; by autograd through the head alone where that is more than a matrix.
        max_elements: logits held at once; None: by the device.

    Returns:
        fp32 log-probs (n,), and (n, H) in fp32 or None.
    """
    matrix = is_matrix(parts.head)
    vocabulary = parts.config.vocab_size
    limit = limits(hidden.device)
    whole = max(1, (max_elements or limit.elements) // vocabulary), vocabulary
    rows, columns = tiles(max(1, len(hidden)), vocabulary, limit, max_elements) if matrix else whole
    function = _by_blocks if matrix else _by_autograd if errors else _by_rows
    pieces = zip(hidden.split(rows), picked.split(rows), strict=True)
    with torch.no_grad():
        found = [function(parts, *piece, temperature, errors, columns) for piece in pieces]
    scores = torch.cat([score for score, _ in found])
    return scores, torch.cat([error for _, error in found if error is not None]) if errors else None


def _blocks(size: int, columns: int) -> Iterator[slice]:
    return (slice(first, min(first + columns, size)) for first in range(0, size, columns))


def _by_blocks(
    parts: CausalParts, hidden: Tensor, picked: Tensor, temperature: float, errors: bool, columns: int
) -> tuple[Tensor, Tensor | None]:
    weight: Any = parts.head.weight
    largest = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    total, chosen = torch.zeros_like(largest), torch.zeros_like(largest)
    mean = hidden.new_zeros(hidden.shape, dtype=torch.float32) if errors else None  # of W's rows, by exp(logits)
    for block in _blocks(len(weight), columns):
        logits = parts.logits(hidden, block if len(weight) > block.stop - block.start else None)
        inside = (picked >= block.start) & (picked < block.stop)
        place = (picked - block.start).clamp(0, logits.shape[1] - 1)
        chosen = torch.where(inside, logits.gather(1, place[:, None])[:, 0], chosen)
        slope = None if parts.softcap is None or not errors else _slope(logits, parts.softcap)
        before, largest = largest, torch.maximum(largest, logits.amax(-1))
        shrink = ((before - largest) / temperature).exp()
        logits.sub_(largest[:, None])
        if temperature != 1.0:
            logits.div_(temperature)
        total = total * shrink + logits.exp_().sum(-1)
        if mean is not None:
            weighted = logits if slope is None else logits.mul_(slope)
            mean.mul_(shrink[:, None]).add_(times_weight(weighted, weight[block]))
    scores = (chosen - largest) / temperature - total.log()
    if mean is None:
        return scores, None
    own = weight[picked].float()
    if parts.softcap is not None:
        own = own * _slope(chosen, parts.softcap)[:, None]
    return scores, (own - mean / total[:, None]) * (parts.scale / temperature)


def _slope(logits: Tensor, softcap: float) -> Tensor:
    """Derivative of softcap tanh(x / softcap), given its value."""
    return 1 - (logits / softcap).square()


def _by_rows(parts: CausalParts, hidden: Tensor, picked: Tensor, temperature: float, *_: Any) -> tuple[Tensor, None]:
    return token_logprobs(parts.logits(hidden), picked, temperature), None


def _by_autograd(
    parts: CausalParts, hidden: Tensor, picked: Tensor, temperature: float, *_: Any
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        scores = token_logprobs(parts.logits(leaf), picked, temperature)
        (error,) = torch.autograd.grad(scores.sum(), leaf)
    return scores.detach(), error.float()


def token_logprobs(logits: Tensor, picked: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature)[picked], (rows,), of fp32 logits (rows, V).

    Without autograd the logits are overwritten: on a CPU a second (rows, V) buffer costs as much as the exponentials.
    """
    if torch.is_grad_enabled():
        logits = logits / temperature
        return logits.gather(-1, picked[:, None])[:, 0] - logits.logsumexp(-1)
    chosen = logits.gather(-1, picked[:, None])[:, 0]
    largest, total = exponentiate_(logits, temperature)
    return (chosen - largest) / temperature - total.log()


def exponentiate_(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Make logits (rows, V) exp((logits - max) / T), in place; return the largest logits and the sums, each (rows,)."""
    largest = logits.amax(-1)
    logits.sub_(largest[:, None])
    if temperature != 1.0:
        logits.div_(temperature)
    return largest, logits.exp_().sum(-1)
