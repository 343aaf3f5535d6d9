"""What engines are given and give: prompts with their completions, sampled ones, and how to sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from zopro.errors import InputError
from zopro.zo.directions import there


@dataclass
class Rollouts:
    """Completions of N prompts, K consecutive rows each. C is the longest completion, P the longest prompt.

    `logprobs` are those of the sampled tokens under softmax(logits / T), before top-k, top-p and min-p: the numbers
    that `Engine.logprobs(temperature=T)` gives, so that an on-policy ratio is 1. They are 0 on padding.
    """

    prompt_ids: Tensor  # (N * K, P) int64, padded on the left
    prompt_mask: Tensor  # (N * K, P) int64
    completion_ids: Tensor  # (N * K, C) int64, padded on the right
    completion_mask: Tensor  # (N * K, C) int64, 1 up to and including the EOS token
    logprobs: Tensor  # (N * K, C) fp32, nats

    def split(self, parts: int) -> list[Rollouts]:
        """As many equal parts, each padded as it would be alone."""
        found = []
        for rows in torch.arange(len(self.completion_ids)).chunk(parts):
            kept = int(self.completion_mask[rows].sum(1).max())
            tokens = (self.completion_ids, self.completion_mask, self.logprobs)
            found.append(Rollouts(self.prompt_ids[rows], self.prompt_mask[rows], *(part[rows, :kept] for part in tokens)))
        return found

    def answers(self) -> list[list[int]]:
        """Token ids of each completion without padding, EOS kept."""
        lengths = self.completion_mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.completion_ids.tolist(), lengths, strict=True)]


class Batch(NamedTuple):
    """Rows of prompts, padded on the left, each followed by a completion, padded on the right.

    `completion_logprobs(model, *batch)` and TRL's own functions take its parts in this order.
    """

    input_ids: Tensor  # (B, P + C) int64
    attention_mask: Tensor  # (B, P + C), 1 on real tokens
    completion_length: int  # C

    @classmethod
    def of(cls, rollouts: Rollouts) -> Batch:
        return cls.of_inputs(vars(rollouts))

    @classmethod
    def of_inputs(cls, inputs: Mapping[str, Tensor]) -> Batch:
        """Of what TRL's trainers call prompt_ids, prompt_mask, completion_ids and completion_mask."""
        ids, mask = (
            torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        return cls(ids, mask, inputs["completion_ids"].shape[1])

    @property
    def prompt_ids(self) -> Tensor:
        return self.input_ids[:, : -self.completion_length]

    @property
    def completion_ids(self) -> Tensor:
        return self.input_ids[:, -self.completion_length :]

    @property
    def completion_mask(self) -> Tensor:
        return self.attention_mask[:, -self.completion_length :]

    def rows(self, index: Tensor) -> Batch:
        """Those of the given rows, in their order."""
        return self._replace(input_ids=self.input_ids[index], attention_mask=self.attention_mask[index])

    def twice(self) -> Batch:
        """The rows, and all of them once more."""
        ids, mask = (torch.cat([tensor, tensor]) for tensor in (self.input_ids, self.attention_mask))
        return self._replace(input_ids=ids, attention_mask=mask)

    def sums(self, tokens: Tensor) -> Tensor:
        """(B,) of (B, C): over each completion's real tokens."""
        return (tokens * self.completion_mask).sum(1)


def left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Token ids (N, P) of prompts, and 1 on real ones."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def check_prompts(prompts: Sequence[Sequence[int]], k: int, new: int, context: float) -> None:
    """Raise InputError where `k` completions of `new` tokens cannot be asked of a model with such a context."""
    if not prompts:
        raise InputError("prompts: must hold at least one prompt, got none.")
    for name, value in (("num_generations", k), ("max_new_tokens", new)):
        if value < 1:
            raise InputError(f"{name}: must be at least 1, got {value}.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompts: prompt {number} has no token; begin it with the tokenizer's BOS.")
        if len(prompt) + new > context:
            raise InputError(
                f"prompts: prompt {number} has {len(prompt)} tokens, which with max_new_tokens={new} exceeds the model's "
                f"context of {context}. Shorten either."
            )


Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for each row, or one for all; None: the global random state."""


def again(generator: Generators) -> Generators:
    """Generators that stand where these do, which stay there."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator and generator.clone_state()
    return [row.clone_state() for row in generator]


def uniform_numbers(generator: Generators, rows: int, steps: int, device: torch.device) -> Tensor:
    """(rows, steps) fp64 in [0, 1]: every engine draws tokens by these, so that the same seeds mean the same numbers.

    On a device without fp64 they are fp32. Raises InputError: another number of generators than rows.
    """
    if isinstance(generator, Sequence) and len(generator) != rows:
        raise InputError(f"generator: must be one, or one for each of the {rows} rows, got {len(generator)}.")
    return _drawn(generator, rows, steps, device).to(there.widest(device)).to(device)


def _drawn(generator: Generators, rows: int, steps: int, device: torch.device) -> Tensor:
    """On the generator's device."""
    if isinstance(generator, Sequence):
        return torch.stack([_drawn(one, 1, steps, device)[0] for one in generator])
    source = generator.device if generator is not None else device
    return torch.rand((rows, steps), dtype=there.widest(source), generator=generator, device=source)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Truncations follow one another: top-k, top-p, min-p."""

    max_new_tokens: int
    eos_token_ids: Sequence[int]  # any ends a row, and is part of it
    pad_token_id: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None
    do_sample: bool = True
    generator: Generators = None  # a server takes their `initial_seed()`
