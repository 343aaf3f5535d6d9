"""How a trainer's answers are drawn: TRL's arguments of generation as far as the engine takes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zopro.errors import InputError

ROW = "zopro_row"
"""The loop's own column, which says for the journal which row of the data each is; a user's columns have other names."""


@dataclass(frozen=True)
class Drawn:
    """What was drawn last: the mean reward, and the rows of the data (their column `ROW`) that were answered."""

    reward: float
    rows: list[int]


def drawing(args: Any) -> dict[str, Any]:
    """Arguments of `zopro.engine.Sampling` as a `trl.RLOOConfig` has them; `generation_kwargs` win, as in TRL.

    None in them leaves the argument as it is. `cache_implementation` is not looked at: the engine has a cache of its own,
    on which no answer depends.

    Raises:
        InputError: a repetition penalty, or keys of `generation_kwargs` that the engine does not draw by.
    """
    named = {
        "max_new_tokens": args.max_completion_length,
        "do_sample": True,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
    }
    asked = {name: value for name, value in (args.generation_kwargs or {}).items() if value is not None}
    penalty = asked.pop("repetition_penalty", args.repetition_penalty)
    if penalty != 1:
        raise InputError(f"repetition_penalty: must be 1, since the engine has none, got {penalty}. Leave it out.")
    if unknown := sorted(asked.keys() - named.keys()):
        raise InputError(
            f"generation_kwargs: must be of {', '.join(named)}, by which the engine draws, got {', '.join(unknown)}. "
            "Leave out the others."
        )
    drawn = named | asked
    return drawn | {"top_k": drawn["top_k"] or None}
