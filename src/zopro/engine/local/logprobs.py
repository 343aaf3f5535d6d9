"""Log-probs of given completions without a [batch, time, vocabulary] tensor.

The backbone runs once; the output matrix is applied to the completion tokens only, packed into contiguous rows, a
bounded number of logits at a time (`zopro.engine.local.head`). With autograd on, a row's gradient is taken as its
log-prob is computed, so that backward needs neither kept logits nor the output matrix: first-order baselines run the same
code at the same memory.

Prompts shared by K consecutive completions can go through the backbone once (`num_generations=K`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import CausalParts, causal_parts, positions
from zopro.engine.local.head import limits, score_tokens, token_logprobs
from zopro.engine.local.lengths import by_length, pass_cost
from zopro.engine.local.shared import Watch, hidden_shared


@overload
def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    *,
    temperature: float = ...,
    max_logit_elements: int | None = ...,
    return_entropy: Literal[False] = ...,
    num_generations: int = ...,
) -> Tensor: ...


@overload
def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    *,
    temperature: float = ...,
    max_logit_elements: int | None = ...,
    return_entropy: Literal[True],
    num_generations: int = ...,
) -> tuple[Tensor, Tensor]: ...


def completion_logprobs(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    *,
    temperature: float = 1.0,
    max_logit_elements: int | None = None,
    return_entropy: bool = False,
    num_generations: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probability in nats of each completion token under softmax(logits / temperature).

    Args:
        model: a transformers causal model or a PEFT model over one, in the mode (train, eval) it should run in.
        input_ids: (B, P + C): prompts padded on the left, then completions padded on the right.
        attention_mask: (B, P + C): 1 on real tokens. Positions count these only, as in `generate`.
        completion_length: C.
        temperature: divides the logits.
        max_logit_elements: logits held at once, by default as suits the device; at least one row's where the head is more
            than a matrix or is trained.
        num_generations: K > 1 says that each K consecutive rows have the same prompt, which then runs once. The same
            numbers up to rounding. Plain if the model checkpoints activations, which excludes the cache.
        return_entropy: also return the entropy (B, C) in nats, without a gradient.

    Returns:
        (B, C) fp32, differentiable if autograd is on; exactly 0 where the completion is padding.

    Raises:
        ValueError: shapes do not fit, or rows that should share a prompt do not.
    """
    parts = causal_parts(model)
    shared = num_generations if abilities(parts).shares else 1

    def run(ids: Tensor, mask: Tensor) -> list[Tensor]:
        states = completion_states(parts, ids, mask, completion_length, shared)
        values = packed(parts, states.hidden, states.targets, temperature, max_logit_elements, return_entropy)
        return [states.unpacked(value) for value in values]

    _check_shapes(input_ids, attention_mask, completion_length, num_generations)
    copies = None if torch.is_grad_enabled() else num_generations
    result = in_batches(parts, input_ids, attention_mask, completion_length, run, copies)
    return (result[0], result[1]) if return_entropy else result[0]


def in_batches(
    parts: CausalParts,
    ids: Tensor,
    mask: Tensor,
    completion_length: int,
    run: Callable[[Tensor, Tensor], list[Tensor]],
    copies: int | None = None,
) -> list[Tensor]:
    """`run` of ids and mask for all rows, or where padding is not right for those of each length; its results by row.

    With `copies`, the rows of each prompt, rows also go in groups of about the same length where that pays.
    """
    able = abilities(parts)
    if able.pads:
        groups = [] if copies is None else _of_like_lengths(mask, completion_length, copies, able.shares)
        if len(groups) < 2:
            return run(ids, mask)
    else:
        lengths = mask[:, :-completion_length].sum(1)
        if not able.pads_right:
            lengths = lengths * mask.shape[1] + mask.sum(1)
        groups = [(lengths == length).nonzero()[:, 0] for length in lengths.unique()]
    order = torch.cat(groups).argsort()
    found = [run(ids[rows], mask[rows]) for rows in groups]
    return [torch.cat(values)[order] for values in zip(*found, strict=True)]


def _of_like_lengths(mask: Tensor, completion_length: int, copies: int, shares: bool) -> list[Tensor]:
    """Rows by the length of their prompts; where no rows share a prompt's pass, within these by that of completions.

    Rows of a shared prompt stay side by side: `hidden_shared` groups their completions.
    """
    cost = pass_cost(mask.device)
    if cost is None:
        return []
    real = mask.bool()
    prompts = real[::copies, :-completion_length].sum(1).tolist()
    answers = real[:, -completion_length:].sum(1).tolist()
    shared = copies > 1 and shares
    groups = []
    for group in by_length(prompts, 2 * cost if shared else cost):
        rows = [prompt * copies + copy for prompt in group for copy in range(copies)]
        inner = [list(range(len(rows)))] if shared else by_length([answers[row] for row in rows], cost)
        groups += [torch.tensor([rows[place] for place in places], device=mask.device) for places in inner]
    return groups


@dataclass(frozen=True)
class CompletionStates:
    """What predicts the real completion tokens of a batch, packed into rows: N of them, in reading order."""

    hidden: Tensor  # (N, H), after the final norm
    targets: Tensor  # (N,), the token that each predicts
    real: Tensor  # (B, C'), where they stand; C' leaves out columns at the end that are padding in every row
    completion_length: int  # C

    def unpacked(self, values: Tensor) -> Tensor:
        """Values (N,) at their places in (B, C) fp32, 0 on padding."""
        empty = torch.zeros(self.real.shape, dtype=torch.float32, device=values.device)
        beyond = (0, self.completion_length - self.real.shape[1])
        return torch.nn.functional.pad(empty.masked_scatter(self.real, values), beyond)


def completion_states(
    parts: CausalParts,
    input_ids: Tensor,
    attention_mask: Tensor,
    completion_length: int,
    num_generations: int = 1,
    watch: Watch | None = None,
    tail: int | None = None,
    alone: bool = False,
) -> CompletionStates:
    """Run the backbone over prompts and completions. Arguments and errors as in `completion_logprobs`.

    Args:
        watch: looks on; the selections of all passes, joined along time and packed by `real`, are the rows of `hidden`.
        tail: columns of the prompts, at most all, that go through the network with the completions; the rest goes before
            them, once for `num_generations`. None: none, and no pass of their own for prompts that nothing shares.
        alone: each row goes through the network by itself, without a cache; its last token, which predicts nothing, not.
    """
    _check_shapes(input_ids, attention_mask, completion_length, num_generations)
    prompt_length = input_ids.shape[1] - completion_length
    used = attention_mask.any(0).nonzero()
    first = min(int(used[0]) if len(used) else 0, prompt_length - 1)
    last = max(int(used[-1]) + 1 if len(used) else 0, prompt_length + 1)
    ids, mask = input_ids[:, first:last], attention_mask[:, first:last]  # columns of padding only are not worth a pass
    split = prompt_length - first
    real = mask[:, split:].bool()

    watch = watch or Watch()
    watch.expect(real)
    able = abilities(parts)
    one_by_one = torch.is_grad_enabled() and ids.shape[1] - 1 - split < able.gradients_from
    shares = num_generations > 1 and able.shares and not one_by_one and not parts.checkpoints
    watch.over(torch.arange(len(ids), device=ids.device))
    if alone:
        with watch.passing(lambda states: states[:, split - 1 :]):
            hidden = parts.hidden(ids[:, :-1], mask[:, :-1], positions(mask)[:, :-1], None)[:, split - 1 :]
    elif tail is not None or shares:
        seen = (ids[:, :-1], mask[:, :-1])
        hidden = hidden_shared(parts, *seen, split, num_generations, watch, min(tail or 0, split))
    else:
        with watch.passing(lambda states: states[:, split - 1 : -1]):
            hidden = parts.hidden(ids, mask, positions(mask), None)[:, split - 1 : -1]
    return CompletionStates(hidden[real], ids[:, split:][real], real, completion_length)


def _check_shapes(input_ids: Tensor, attention_mask: Tensor, completion_length: int, num_generations: int) -> None:
    rows, length = input_ids.shape
    if attention_mask.shape != input_ids.shape or not 0 < completion_length < length:
        raise ValueError(
            f"completion_length: must leave a prompt in {tuple(input_ids.shape)} ids and a mask of the same shape, "
            f"got {completion_length} and {tuple(attention_mask.shape)}."
        )
    if num_generations < 1 or rows % num_generations:
        raise ValueError(f"num_generations: must divide the {rows} rows, got {num_generations}.")


def packed(
    parts: CausalParts, hidden: Tensor, targets: Tensor, temperature: float, max_elements: int | None, with_entropy: bool
) -> list[Tensor]:
    """Log-probs and, if asked for, entropies, each (tokens,), of hidden states (tokens, H)."""
    rows = max(1, (max_elements or limits(hidden.device).elements) // parts.config.vocab_size)

    def score(states: Tensor, picked: Tensor) -> Tensor:
        return token_logprobs(parts.logits(states), picked, temperature)

    trains_head = any(parameter.requires_grad for parameter in parts.head.parameters())
    if not (torch.is_grad_enabled() and (hidden.requires_grad or trains_head)):
        scores = score_tokens(parts, hidden, targets, temperature, max_elements=max_elements)[0]
    elif trains_head:  # its gradient needs the logits again
        pieces = zip(hidden.split(rows), targets.split(rows), strict=True)
        scores = torch.cat([checkpoint(score, *piece, use_reentrant=False) for piece in pieces])
    else:
        scores = _ScoredTokens.apply(parts, hidden, targets, temperature, max_elements)
    if not with_entropy:
        return [scores]
    with torch.no_grad():
        entropies = [_entropy(parts.logits(states) / temperature) for states in hidden.split(rows)]
    return [scores, torch.cat(entropies)]


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


class _ScoredTokens(torch.autograd.Function):
    """Log-probs (tokens,) that keep their gradients with respect to the hidden states, taken at once."""

    @staticmethod
    def forward(
        ctx: Any, parts: CausalParts, hidden: Tensor, targets: Tensor, temperature: float, max_elements: int | None
    ) -> Tensor:
        scores, errors = score_tokens(parts, hidden, targets, temperature, errors=True, max_elements=max_elements)
        ctx.save_for_backward(errors)
        ctx.dtype = hidden.dtype
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None, None]:
        (errors,) = ctx.saved_tensors
        return None, (errors * upstream[:, None]).to(ctx.dtype), None, None, None
