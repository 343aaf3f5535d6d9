"""What a reward model reads: rows, and the one rule that makes token ids of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from zopro.errors import InputError
from zopro.text.frame import Frame


@dataclass(frozen=True)
class Pair:
    """Two answers to one rendered prompt, the first the better one."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Scored:
    """An answer with its direct-assessment score, in the data's own unit."""

    prompt: str
    answer: str
    score: float


def different_scores(rows: Sequence[Scored], purpose: str) -> list[float]:
    """The rows' scores. Raises `InputError`: one is not finite, or all are equal, of no use for `purpose`."""
    scores = []
    for i, row in enumerate(rows):
        if not math.isfinite(row.score):
            raise InputError(f"rows: every score must be a finite number, got {row.score!r} in row {i}.")
        scores.append(float(row.score))
    if len(set(scores)) < 2:
        raise InputError(f"rows: must hold at least two different scores to {purpose}, got {len(rows)} rows.")
    return scores


@dataclass(frozen=True)
class Sequences:
    """prompt + answer in its frame (`zopro.text.frame`), at most `max_length` tokens, in training and scoring alike.

    Every answer gets the frame's ending: whichever token ended it when it was sampled, and also where the sampling
    limit cut it. Where the sequence would be too long the answer loses its tail, never the prompt or the ending; a
    prompt that leaves no room for its answer is refused with an `InputError`.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    frame: Frame

    def from_text(self, prompts: Sequence[str], answers: Sequence[str]) -> tuple[list[list[int]], int]:
        """Token ids of every prompt + opening + answer + ending, and how many were cut.

        The text is tokenised as one string, so that a token may span the border, as in TRL's trainers.
        """
        _check_equal_length(prompts, answers, "answers")
        if not prompts:
            return [], 0
        texts = [prompt + self.frame.write(answer) for prompt, answer in zip(prompts, answers, strict=True)]
        whole, alone = self.tokenizer(texts)["input_ids"], self.tokenizer(list(prompts))["input_ids"]
        bodies = [
            self.frame.without_ending(ids) if len(ids) > len(prompt) else ids
            for ids, prompt in zip(whole, alone, strict=True)
        ]
        return self._ended(bodies, [len(ids) for ids in alone])

    def whole(self, prompt: str, *answers: str) -> bool:
        """Whether none of the answers to a prompt is cut."""
        return self.from_text([prompt] * len(answers), answers)[1] == 0

    def from_ids(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids joined as they are; a completion's first stop and what follows it give way to the ending."""
        _check_equal_length(prompts, completions, "completions")
        bodies = [[*prompt, *self.frame.body(ids)] for prompt, ids in zip(prompts, completions, strict=True)]
        return self._ended(bodies, [len(prompt) for prompt in prompts])[0]

    def _ended(self, bodies: list[list[int]], prompt_lengths: list[int]) -> tuple[list[list[int]], int]:
        ended, cut, room = [], 0, self.max_length - len(self.frame.ending)
        for row, (body, prompt_length) in enumerate(zip(bodies, prompt_lengths, strict=True)):
            if len(body) > room:
                if prompt_length >= room:
                    raise InputError(
                        f"prompts: must leave room for an answer and EOS within max_length={self.max_length}, got "
                        f"{prompt_length} tokens in row {row}. Raise max_length or leave the row out."
                    )
                cut += 1
            ended.append([*body[:room], *self.frame.ending])
        return ended, cut


def _check_equal_length(prompts: Sequence[object], others: Sequence[object], name: str) -> None:
    if len(prompts) != len(others):
        raise InputError(f"{name}: must be as many as prompts ({len(prompts)}), got {len(others)}.")
