"""What fine-tuning and the first reward model learn from: answers that end within max_completion_length.

check_answers(config, data, frame)      # before a model is loaded: there is something to learn from
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.data import Data, Item
from zopro.rewards import Pair, RewardModel, Scored
from zopro.system.progress import say
from zopro.text.frame import Frame

Fits = Callable[..., bool]
"""Whether all answers that it is given fit."""


def ending_within(frame: Frame, config: RunConfig) -> Fits:
    """Whether answers, all of them, end within max_completion_length: longer ones would teach not to end."""
    limit = config.max_completion_length
    return lambda *answers: all(answer is None or frame.length(answer) <= limit for answer in answers)


def answered(items: Sequence[Item], fit: Fits) -> Iterator[Item]:
    """The items whose chosen answer fits."""
    return (item for item in items if item.example.chosen is not None and fit(item.example.chosen))


def pairs(items: Sequence[Item], fit: Fits | None = None) -> Iterator[Pair]:
    """The items' chosen and rejected answers; with `fit`, of those whose two answers fit."""
    return (
        Pair(item.prompt, item.example.chosen, item.example.rejected)
        for item in items
        if item.example.chosen is not None
        and item.example.rejected is not None
        and (fit is None or fit(item.example.chosen, item.example.rejected))
    )


def scored(items: Sequence[Item], fit: Fits | None = None) -> Iterator[Scored]:
    """The items' answers with their direct-assessment scores; with `fit`, of those that fit."""
    return (
        Scored(item.prompt, item.example.chosen, item.example.score)
        for item in items
        if item.example.chosen is not None
        and item.example.score is not None
        and (fit is None or fit(item.example.chosen))
    )


def held_out_quality(model: RewardModel, data: Data, batch_size: int) -> dict[str, float]:
    """What a reward model is worth on held-out rows; empty where they cannot say. Rows with an answer that does not fit
    are left out, with a line."""
    if data.regressed:
        rows: list[Any] = [*scored(data.eval)]
        found = model.correlation(rows, batch_size) if len({row.score for row in rows}) > 1 else {}
    else:
        rows = [*pairs(data.eval)]
        found = model.accuracy(rows, batch_size) if rows else {}
    if cut := len(rows) - found.get("n", len(rows)):
        say(
            f"reward model: {cut} of {len(rows)} held-out rows have an answer that does not fit into max_prompt_length "
            "and max_completion_length, and are not measured"
        )
    return found


def check_answers(config: RunConfig, data: Data, frame: Frame) -> None:
    """Raise `InputError` where no answer is short enough to fine-tune on, or for the reward model to learn from."""
    fits, limit = ending_within(frame, config), config.max_completion_length
    if config.sft_steps and not any(True for _ in answered(data.train, fits)):
        raise InputError(f"max_completion_length: no chosen answer ends within {limit} tokens. Raise it.")
    if not config.trains_reward:
        return
    if data.regressed:
        what, rows = "two different scores", scored(data.train, fits)
        first = next(rows, None)
        enough = any(first is not None and row.score != first.score for row in rows)
    else:
        what, enough = "a chosen and a rejected answer", any(True for _ in pairs(data.train, fits))
    if not enough:
        raise InputError(
            f"train_data: must have {what} that end within max_completion_length={limit} tokens, got none. Raise "
            "max_completion_length, or choose another task."
        )


def check_answers_early(config: RunConfig, data: Data, frame: Frame) -> None:
    """`check_answers` where the model's own stop tokens are not known yet: an ending has at least the last token."""
    check_answers(config, data, replace(frame, ending=frame.ending[-1:]))
