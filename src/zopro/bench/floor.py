"""The floor: the bare forward passes that a policy step cannot do without, on the step's own model and shapes.

Prompts are prefilled once for their K completions. A pass is the backbone and the output matrix on the completion
positions: no sampling, no log-softmax, no loss, no reward function's own work, no trainer. What is left out is what the
ratio of step and floor charges to the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from zopro.bench.clock import Watch
from zopro.bench.work import Setting
from zopro.engine.gpu.decoding import fixed_decoding
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import Decoder, causal_parts, evaluating, positions
from zopro.engine.local.growing import growing_cache
from zopro.engine.local.head import limits, tiles
from zopro.engine.local.shared import hidden_shared, select_rows
from zopro.errors import InputError


def floor_passes(setting: Setting) -> Callable[[Watch], dict[str, float]]:
    """A function that runs the passes and returns their seconds: rollout, scoring, reference (beta > 0), log-probs."""
    work = setting.work
    if setting.classifier is None:
        raise ValueError("setting: must have the reward model's classifier, got None")
    judge = setting.classifier
    parts = causal_parts(setting.policy)
    able = abilities(parts)
    if not (able.pads and able.decodes and able.shares):
        raise InputError(f"model: the floor is of models that prefill prompts once; {parts.config.model_type} cannot.")
    device = setting.policy.device
    width = max(map(len, setting.prompt_ids))
    pad = setting.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in setting.prompt_ids], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in setting.prompt_ids], device=device)
    copies = torch.arange(len(ids), device=device).repeat_interleave(work.num_generations)
    completions = ids[copies][:, -1:].expand(-1, work.completion_length).contiguous()
    after = mask.sum(-1)[copies]
    seen = torch.cat([mask[copies], torch.ones_like(completions), torch.ones_like(after)[:, None]], dim=1)
    joined = torch.cat([ids[copies], completions, completions[:, -1:]], dim=1)  # the reward is read at an EOS after it
    classifier = Decoder(judge, judge.base_model)

    def rollout() -> None:
        with fixed_decoding(parts, able) as fixed:
            if fixed is not None:
                return fixed.passes(parts, ids, mask, work.num_generations, work.completion_length)
        cache = growing_cache(parts.model.config)
        hidden = parts.hidden(ids, mask, positions(mask), cache)[:, -1][copies]
        select_rows(cache, copies)
        for step in range(work.completion_length):
            parts.output(hidden.contiguous())
            if step < work.completion_length - 1:
                hidden = parts.hidden(
                    completions[:, step : step + 1], seen[:, : width + step + 1], (after + step)[:, None], cache
                )[:, -1]

    def logprobs() -> None:
        rows = hidden_shared(parts, joined[:, :-2], seen[:, :-2], width, work.num_generations).flatten(0, 1)
        height, width_of_tile = tiles(len(rows), parts.config.vocab_size, limits(rows.device))
        for piece in rows.split(height):
            for first in range(0, parts.config.vocab_size, width_of_tile):
                parts.output(piece, slice(first, first + width_of_tile))

    def run(clock: Watch) -> dict[str, float]:
        seconds: dict[str, float] = {}

        def timed(name: str, work_of: Callable[[], object], times: int = 1) -> None:
            start = clock.now()
            for _ in range(times):
                work_of()
            seconds[name] = clock.now() - start

        with torch.no_grad(), evaluating(setting.policy), evaluating(judge):
            timed("rollout", rollout)
            timed("scoring", lambda: hidden_shared(classifier, joined, seen, width, work.num_generations))
            if work.beta:
                timed("reference", logprobs)
            timed("log-probs", logprobs, work.sides * work.queries)
        return seconds

    return run
