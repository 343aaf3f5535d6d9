"""Rows of a batch between the lists that serving engines read and the padded tensors of the protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from zopro.engine import Rollouts
from zopro.engine.batch import left_padded


class Asked(NamedTuple):
    """A prompt and the rows of the result that begin with it."""

    prompt: Sequence[int]
    rows: list[int]

    def cells(self, new: Sequence[int]) -> int:
        """Tokens of the prompt, and of each row's new ones, of which `new` has the number for every row of the result."""
        return len(self.prompt) + sum(new[row] for row in self.rows)


def unpadded(ids: Tensor, mask: Tensor) -> list[list[int]]:
    return [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]


def rollouts_of(
    prompts: Sequence[Sequence[int]], k: int, answers: Sequence[list[int]], logprobs: Tensor, pad: int
) -> Rollouts:
    long = max(map(len, answers))
    ids, mask = left_padded(prompts, pad)
    return Rollouts(
        prompt_ids=ids.repeat_interleave(k, dim=0),
        prompt_mask=mask.repeat_interleave(k, dim=0),
        completion_ids=torch.tensor([answer + [pad] * (long - len(answer)) for answer in answers]),
        completion_mask=torch.tensor([[1] * len(answer) + [0] * (long - len(answer)) for answer in answers]),
        logprobs=logprobs[:, :long].contiguous(),
    )
