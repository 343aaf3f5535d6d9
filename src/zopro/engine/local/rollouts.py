"""Sampling over transformers models' KV cache: each prompt prefilled once for its K completions.

Departures from `transformers.generate`: no logits processors (temperature, top-k, top-p and min-p are applied to the
last hidden state's logits directly), the sampled token's log-prob comes with it, rows that have ended leave the batch,
the cache grows in place, and tokens are drawn as `zopro.engine.local.sampling` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from zopro.engine.batch import Generators, Rollouts, check_prompts, left_padded, uniform_numbers
from zopro.engine.gpu.decoding import fixed_decoding
from zopro.engine.gpu.step import Drawing
from zopro.engine.local.abilities import abilities, reads_prefixes
from zopro.engine.local.causal import CausalParts, causal_parts, evaluating, why_not_finite
from zopro.engine.local.members import Members
from zopro.engine.local.models import context_of
from zopro.engine.local.prefix import worth_sharing
from zopro.engine.local.reading import Cached, Recomputed
from zopro.engine.local.sampling import Sampler, next_tokens

__all__ = ["Rollouts", "generate"]

MAX_BATCH_TOKENS = 2**16  # tokens in the cache at once
COMPACT_AT = 7 / 8  # share of live rows; dropping the others copies the cache


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    num_generations: int = 1,
    max_new_tokens: int,
    eos_token_ids: Sequence[int] | int,
    pad_token_id: int,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float | None = None,
    generator: Generators = None,
    max_batch_tokens: int | None = None,
    members: Members | None = None,
) -> Rollouts:
    """Sample `num_generations` completions of each prompt.

    Args:
        model: a transformers causal model or a PEFT model over one; runs in eval mode and comes back in its own.
        prompts: token ids, none empty.
        eos_token_ids: any of these ends a row; it is part of the completion.
        top_k, top_p, min_p: truncation in this order, each of what the one before left (as transformers does).
        generator: on any device. One uniform number is drawn for each (row, step) before sampling starts, so neither
            `max_batch_tokens` nor the length of other rows changes a completion, except by rounding of the logits.
            Of several generators, one for each row, a row has its own, and which rows are beside it changes nothing
            either. None draws from the global random state.
        max_batch_tokens: bound on rows x (prompt + max_new_tokens) in one batch, default 65536; one prompt's K
            completions always go together. Prompts are batched by length.
        members: displaced policies, each of which answers all prompts with the same random numbers; the rows of the first
            come first.

    Raises:
        InputError: an argument out of range, or a prompt that leaves no room for its completion in the context.
        FloatingPointError: the model's logits are not finite.
        Apart: the members cannot go through the network together.
    """
    sampler = Sampler(do_sample, temperature, top_k, top_p, min_p or 0.0)
    parts = causal_parts(model)
    with torch.no_grad():
        able = abilities(parts)
        prefixes = members is not None and able.decodes and reads_prefixes(parts)
    context = context_of(parts.model) or float("inf")
    check_prompts(prompts, num_generations, max_new_tokens, context)
    device = parts.model.get_input_embeddings().weight.device
    once, times = len(prompts), 1 if members is None else members.count
    uniform = uniform_numbers(generator, once * num_generations, max_new_tokens, device).repeat(times, 1)
    prompts = [*prompts] * times
    rows, width = len(prompts) * num_generations, max(map(len, prompts))
    ends = (eos_token_ids,) if isinstance(eos_token_ids, int) else tuple(eos_token_ids)
    how, stops = Drawing(sampler, ends, pad_token_id), torch.tensor(ends, device=device)

    prompt_ids, prompt_mask = left_padded(prompts, pad_token_id, device)
    completion_ids = torch.full((rows, max_new_tokens), pad_token_id, device=device)
    logprobs = torch.zeros((rows, max_new_tokens), device=device)
    lengths = torch.zeros(rows, dtype=torch.long, device=device)
    copies = torch.arange(num_generations, device=device)
    budget = max_batch_tokens or MAX_BATCH_TOKENS
    with torch.no_grad(), evaluating(parts.model), fixed_decoding(parts, able) as fixed, members or nullcontext():
        sizes = [len(prompt) for prompt in prompts]
        for batch in _batches(sizes, num_generations, max_new_tokens, budget, equal=not able.pads):
            # a member's rows side by side
            index = torch.tensor(batch if members is None else sorted(batch), device=device)
            longest = max(len(prompts[i]) for i in batch)
            where = (index[:, None] * num_generations + copies).flatten()
            ids, mask = prompt_ids[index, width - longest :], prompt_mask[index, width - longest :]
            owners = None if members is None else (members, index // once)
            prefix = worth_sharing(ids, mask, owners) if prefixes and owners is not None else 0
            if fixed is not None:
                found = fixed.decode(parts, ids, mask, num_generations, how, uniform[where], owners, prefix)
            else:
                given = parts, ids, mask, num_generations, owners
                reading = Cached(*given, prefix) if able.decodes else Recomputed(*given)
                found = _decode(parts, reading, sampler, uniform[where], stops, pad_token_id, members)
            completion_ids[where], logprobs[where], lengths[where] = found
    if not logprobs.isfinite().all():
        reason = why_not_finite(parts.model.dtype, "its weights have diverged")
        raise FloatingPointError(f"generate: the model's logits are not finite; {reason}.")
    kept = int(lengths.max())
    return Rollouts(
        prompt_ids=prompt_ids.repeat_interleave(num_generations, dim=0),
        prompt_mask=prompt_mask.repeat_interleave(num_generations, dim=0),
        completion_ids=completion_ids[:, :kept].contiguous(),
        completion_mask=(torch.arange(kept, device=device) < lengths[:, None]).long(),
        logprobs=logprobs[:, :kept].contiguous(),
    )


def _batches(lengths: Sequence[int], copies: int, new: int, budget: int, equal: bool = False) -> Iterator[list[int]]:
    """Prompts' numbers, shortest first, in batches of at most `budget` tokens (or one prompt), or of equal lengths."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        full = (len(batch) + 1) * copies * (lengths[number] + new) > budget
        if batch and (full or (equal and lengths[number] != lengths[batch[0]])):
            yield batch
            batch = []
        batch.append(number)
    yield batch


def _decode(
    parts: CausalParts,
    reading: Cached | Recomputed,
    sampler: Sampler,
    uniform: Tensor,
    stops: Tensor,
    pad: int,
    members: Members | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Go on from prompts read, by `uniform` (n * K, C): tokens, log-probs (n * K, C) and lengths (n * K,)."""
    total, steps = uniform.shape
    device = uniform.device
    tokens = torch.full((total, steps), pad, device=device)
    scores = torch.zeros((total, steps), device=device)
    counts = torch.zeros(total, dtype=torch.long, device=device)
    rows = torch.arange(total, device=device)  # row of the result that each row of the batch fills
    alive = torch.ones(total, dtype=torch.bool, device=device)
    for step in range(steps):
        token, score = next_tokens(parts, sampler, reading.hidden, uniform[rows, step])
        tokens[rows, step] = torch.where(alive, token, pad)
        scores[rows, step] = torch.where(alive, score, 0.0)
        counts[rows] += alive
        alive = alive & ~torch.isin(token, stops)
        living = int(alive.sum())
        if living == 0 or step == steps - 1:
            break
        if living <= COMPACT_AT * len(rows):
            keep = alive.nonzero()[:, 0]
            reading.select(keep)
            if members is not None:
                members.keep(keep)
            rows, token, alive = rows[keep], token[keep], alive[keep]
        reading.read(token)
    return tokens, scores, counts
