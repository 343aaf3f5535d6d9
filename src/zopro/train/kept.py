"""Rewards of a population on the disk as they come: a generation that is done again asks for the rest only.

One JSON object a line: a digest of the member and its answers, and their rewards. Answers and prompts are not in it.
Each rank has a file of its own and reads all of them, for a resumed job may have fewer or more.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zopro.store.durable import append_line, fix_end, whole_lines
from zopro.zo.displacement import Displacement

FILES = "members-*.jsonl"
Table = list[list[float]]
"""A row for each answer, of each reward function's number; NaN where it does not apply."""


class KeptRewards:
    """The rewards of steps that no checkpoint has yet. A line that cannot be read counts for nothing.

    Args:
        folder: the trainer's.
        rank: of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.path = folder / f"members-{rank}.jsonl"
        self._known: dict[str, Table] = {}
        fix_end(self.path)
        for path in folder.glob(FILES):
            for line in whole_lines(path):
                try:
                    value = json.loads(line)
                    rows = [[math.nan if number is None else float(number) for number in row] for row in value["rewards"]]
                    self._known[str(value["member"])] = rows
                except (ValueError, KeyError, TypeError):
                    continue

    def __len__(self) -> int:
        return len(self._known)

    def get(self, member: Displacement, prompts: Sequence[Any], completions: Sequence[Any]) -> Table | None:
        """The rewards of a member's answers, if they were asked for before this process began."""
        return self._known.get(_digest(member, prompts, completions))

    def keep(self, member: Displacement, prompts: Sequence[Any], completions: Sequence[Any], rewards: Table) -> None:
        """Add a member's rewards; a crash of this process does not lose them."""
        rows = [[None if math.isnan(number) else number for number in row] for row in rewards]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"member": _digest(member, prompts, completions), "rewards": rows})
        append_line(self.path, line, flush=False)


def _digest(member: Displacement, prompts: Sequence[Any], completions: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([repr(member), list(prompts), list(completions)]).encode()).hexdigest()
