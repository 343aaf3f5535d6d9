"""Rewards that a program can compute: no model, no torch; functions as TRL calls them.

    from zopro.rewards.functions import builtin
    builtin("maths")(prompts=["What is 3 + 4?"], completions=["It is 7."], answer=["7"])     # [1.0]
    RLOOTrainer(model, [builtin("countdown"), builtin("length:5-60")], ...)

A further one is a module here and a row of `BUILTINS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zopro.errors import InputError, nearest
from zopro.rewards.functions.answer import CONTAINS, EXACT
from zopro.rewards.functions.base import Builtin, Completion, Reward, text_of
from zopro.rewards.functions.countdown import COUNTDOWN
from zopro.rewards.functions.length import LENGTH
from zopro.rewards.functions.maths import MATHS
from zopro.rewards.functions.pattern import REGEX
from zopro.rewards.functions.structured import JSON

__all__ = ["BUILTINS", "Builtin", "Reward", "builtin", "text_of"]

BUILTINS: dict[str, Builtin] = {
    "exact": EXACT,
    "contains": CONTAINS,
    "regex": REGEX,
    "length": LENGTH,
    "json": JSON,
    "maths": MATHS,
    "countdown": COUNTDOWN,
}


def builtin(spec: str) -> Reward:
    """The reward that `spec` names: "maths", or with a parameter "length:20-60".

    Its `__name__` is `spec`. Raises `InputError` for an unknown name, and for a parameter that is missing, wrong or one
    too many; when called, for rows without a column that it needs.
    """
    name, _, parameter = spec.partition(":")
    if name not in BUILTINS:
        raise InputError(f"reward: must be one of {', '.join(BUILTINS)}, got {spec!r}.{nearest(name, BUILTINS)}")
    made = BUILTINS[name]
    if not made.parameter and spec != name:
        raise InputError(f"reward: {name} takes nothing after its name, got {spec!r}.")
    if made.parameter and not parameter and not (made.optional and spec == name):
        raise InputError(f"reward: {name} must be written {name}:{made.parameter}, got {spec!r}.")
    score = made.make(parameter)

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        for column in made.needs:
            if column not in columns:
                raise InputError(f"reward: {name} needs the column {column} in each row, which there is not.")
        return score(prompts, completions, **columns)

    reward.__name__ = spec
    return reward
