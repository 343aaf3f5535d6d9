"""Verdicts of judges that cost money or time, on the disk as they come: a stage done again asks for the rest only.

One JSON object a line: the pair's sha256 and its winner. Answers, prompts and keys are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zopro.store.durable import fix_end
from zopro.store.kept import digest, keep, kept

Row = tuple[str, Sequence[str], str | None]
"""Prompt, answers, reference."""


class Verdicts:
    """The usable verdicts in one file, begun when the first is kept. A line that cannot be read counts for nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._winners: dict[str, int] = {}
        fix_end(path)
        for value in kept(path):
            if "pair" in value and value.get("winner") in (-1, 0, 1):
                self._winners[str(value["pair"])] = int(value["winner"])

    def get(self, row: Row) -> int | None:
        """The winner of a pair, or None where it is not known."""
        return self._winners.get(_digest(row))

    def keep(self, row: Row, winner: int) -> None:
        """Add a verdict; a crash of this process does not lose it."""
        pair = _digest(row)
        self._winners[pair] = winner
        keep(self.path, {"pair": pair, "winner": winner})


def _digest(row: Row) -> str:
    prompt, answers, reference = row
    return digest(prompt, list(answers), reference)
