"""Rewards that a program can compute: no model, no torch; functions as TRL calls them.

    from zopro.rewards.functions import reward_function
    reward_function("maths")(prompts=["What is 3 + 4?"], completions=["It is 7."], answer=["7"])     # [1.0]
    RLOOTrainer(model, [reward_function("countdown"), reward_function("length:5-60")], ...)

Every built-in one lies in [0, 1]. A further one is a module here, and one call in `zopro.choices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zopro.choices import REWARDS
from zopro.errors import InputError
from zopro.rewards.functions.base import Completion, Reward, text_of

__all__ = ["Reward", "reward_function", "text_of"]


def reward_function(name: str) -> Any:
    """The function that `name` stands for, one of `zopro.choices.REWARDS` that is no network: "maths", "length:20-60".

    The `__name__` of a built-in one is `name`. Raises `InputError` for an unknown name and for a parameter that cannot be
    read; when called, for rows without a column that it needs.
    """
    choice = REWARDS[name]
    if choice.trained or choice.network:
        raise InputError(f"reward: must be a function, got {name!r}, a model.")
    made = choice.load()(name.partition(":")[2])
    if choice.prefix == "python":
        return made

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        for column in choice.needs:
            if column not in columns:
                raise InputError(f"reward: {name} needs the column {column} in each row, which there is not.")
        found: list[float | None] = made(prompts, completions, **columns)
        return found

    reward.__name__ = name
    reward.builtin = True  # type: ignore[attr-defined]
    return reward
