"""Rewards of a population on the disk as they come: a generation that is done again asks for the rest only.

One JSON object a line: a digest of the member and its answers, their rewards, and what the reward functions logged.
Answers and prompts are not in it.
Each rank has a file of its own and reads all of them, for a resumed job may have fewer or more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zopro.errors import InputError
from zopro.store.durable import fix_end
from zopro.store.kept import digest, keep, kept
from zopro.zo.displacement import Displacement

FILES = "members-*.jsonl"


class Asked(NamedTuple):
    """What reward functions say of a member's answers."""

    rewards: list[list[float]]  # a row for each answer, of each function's number; NaN where it does not apply
    logged: dict[str, list[float]]  # numbers that the functions logged, by name


def checked_folder(folder: str | Path) -> Path:
    """Raise InputError where rewards cannot be kept."""
    if Path(folder).exists() and not Path(folder).is_dir():
        raise InputError(f"kept: must be a folder, got the file {folder}. Give another path.")
    return Path(folder)


class KeptRewards:
    """The rewards of steps that no checkpoint has yet. A line that cannot be read counts for nothing.

    Args:
        folder: the trainer's.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path = folder / f"members-{rank}.jsonl"
        self._known: dict[str, Asked] = {}
        fix_end(self.path)
        for path in folder.glob(FILES):
            for value in kept(path):
                try:
                    rows = [[math.nan if number is None else float(number) for number in row] for row in value["rewards"]]
                    self._known[str(value["member"])] = Asked(rows, dict(value["logged"]))
                except (ValueError, KeyError, TypeError):
                    continue

    def __len__(self) -> int:
        return len(self._known)

    def get(self, member: Displacement, prompts: Sequence[Any], completions: Sequence[Any]) -> Asked | None:
        """What was said of a member's answers, if they were asked for before this process began."""
        return self._known.get(_digest(member, prompts, completions))

    def keep(self, member: Displacement, prompts: Sequence[Any], completions: Sequence[Any], asked: Asked) -> None:
        """Add what is said of a member's answers; a crash of this process does not lose it."""
        rows = [[None if math.isnan(number) else number for number in row] for row in asked.rewards]
        keep(self.path, {"member": _digest(member, prompts, completions), "rewards": rows, "logged": asked.logged})


def _digest(member: Displacement, prompts: Sequence[Any], completions: Sequence[Any]) -> str:
    return digest(repr(member), list(prompts), list(completions))
