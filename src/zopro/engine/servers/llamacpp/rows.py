"""Rows of a batch between the lists that llama.cpp reads and the padded tensors of the engine's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zopro.engine import Rollouts, Sampling


class Asked(NamedTuple):
    """A prompt and the rows of the result that begin with it."""

    prompt: Sequence[int]
    rows: list[int]

    def cells(self, new: int) -> int:
        """Tokens of the prompt, and of each row's `new` ones."""
        return len(self.prompt) + len(self.rows) * new


def uniform_of(options: Sampling, rows: int, times: int) -> Tensor:
    """(rows, steps) fp64 in [0, 1): as the local engine draws them, so that the same seeds mean the same numbers."""
    given, steps = options.generator, options.max_new_tokens
    if isinstance(given, Sequence):
        own = [row.clone_state() if times > 1 else row for row in given]
        return torch.stack([torch.rand(steps, dtype=torch.float64, generator=row) for row in own])
    one = given.clone_state() if given is not None and times > 1 else given
    return torch.rand((rows, steps), dtype=torch.float64, generator=one)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def rollouts_of(
    prompts: Sequence[Sequence[int]], k: int, answers: Sequence[list[int]], logprobs: Tensor, pad: int
) -> Rollouts:
    wide, long = max(map(len, prompts)), max(map(len, answers))
    ids = torch.tensor([[pad] * (wide - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (wide - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Rollouts(
        prompt_ids=ids.repeat_interleave(k, dim=0),
        prompt_mask=mask.repeat_interleave(k, dim=0),
        completion_ids=torch.tensor([answer + [pad] * (long - len(answer)) for answer in answers]),
        completion_mask=torch.tensor([[1] * len(answer) + [0] * (long - len(answer)) for answer in answers]),
        logprobs=logprobs[:, :long].contiguous(),
    )
