"""How a trainer's answers are drawn: TRL's arguments of generation as far as the engine takes them, and a seed a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from zopro.engine.local.sampling import Sampler
from zopro.errors import InputError
from zopro.train.arguments import whole
from zopro.zo.directions import tensor_generator

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
        InputError: a repetition penalty, keys of `generation_kwargs` that the engine does not draw by, no limit to an
            answer's tokens, or what `Sampler` refuses.
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
    limit = drawn["max_new_tokens"]
    if not whole(limit) or limit < 1:
        name = "generation_kwargs: max_new_tokens" if "max_new_tokens" in asked else "max_completion_length"
        raise InputError(
            f"{name}: must be a whole number of at least 1, got {limit!r}. Give the most tokens of an answer."
        )
    drawn["top_k"] = drawn["top_k"] or None
    Sampler(drawn["do_sample"], drawn["temperature"], drawn["top_k"], drawn["top_p"], drawn["min_p"] or 0.0)
    return drawn


class RowSeeds:
    """Generators of a trainer's rows. Rows are numbered through all batches of a step, and of an evaluation.

    So what a row draws depends neither on what ran before its step, nor on how rows are shared among ranks, and no two
    rows of a step draw the same numbers. TRL's own step counter begins again at 0 when a run is resumed; the trainer's
    state does not.
    """

    def __init__(self) -> None:
        self._drawn: dict[str, tuple[int, int]] = {}  # by mode: a step, and its rows so far, of this rank

    def begin(self, mode: str) -> None:
        """Number from 0 again, where a training or an evaluation begins at a step that has drawn rows before."""
        self._drawn.pop(mode, None)

    def generators(
        self,
        prompts: Sequence[Sequence[int]],
        mode: str,
        seed: int,
        step: int,
        rank: int = 0,
        ranks: int = 1,
        parts: int = 1,
    ) -> list[torch.Generator]:
        """One for each row, seeded by (seed, mode, prompt, row of the step or evaluation, step).

        Args:
            prompts: token ids of each row of this rank's next batch; other ranks' have as many.
            mode: train or eval, which are numbered apart.
            parts: batches, all as large, into which each rank cuts what lies side by side in the data.
        """
        last, own = self._drawn.get(mode, (step, 0))
        own = own if last == step else 0
        self._drawn[mode] = step, own + len(prompts)
        share = parts * len(prompts)
        within = own % share if parts > 1 else 0
        first = (own - within) * ranks + rank * share + within
        return [
            tensor_generator(f"rollout/{mode}/{row}/{[*prompt]}", seed, step, torch.device("cpu"))
            for row, prompt in enumerate(prompts, first)
        ]
