"""How `zopro` reads what is typed: argparse, whose errors are one line that says what is wrong and what to type instead.
Options have hyphens or underscores in their names, as people type them.

zopro run config.yaml --eval_greedy --iteratons 3    # --iteratons: no such option of 'zopro run'. Did you mean ...
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from zopro.config.arguments import path
from zopro.config.values import TRUTH
from zopro.errors import InputError, nearest

PATHS = ("CONFIG", "RUN", "DIR", "FILE", "FOLDER", "ROWS", "MODEL")
"""How `--help` calls the arguments that are paths, or may be."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `InputError`, one line like every other error."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **kwargs})
        self._words: list[str] = []

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but paths are read as paths, an option that there is none of is told before what is missing,
        and `--key` of a boolean key leaves a word alone that is no truth value."""
        for action in self._actions:
            action.type = path if action.metavar in PATHS else action.type
        if self._subparsers is None:  # else the words are those of a command
            args = self._words = list(self._looked_through(args))
        found, left = super().parse_known_args(args, namespace)
        if left:
            raise self._unknown(left[0])
        return found, left

    def _looked_through(self, words: Sequence[str]) -> Iterator[str]:
        before: argparse.Action | None = None
        names = {name.replace("_", "-"): name for name in self._option_string_actions}
        for place, word in enumerate(words):
            if word == "--":
                yield from words[place:]
                return
            takes = before is not None and before.nargs in (None, "+")
            typed, equals, rest = word.partition("=")
            if word.startswith("--") and typed not in self._option_string_actions:
                name = names.get(typed.replace("_", "-"))
                if name is not None and not (takes and " " in word):
                    word = f"{name}{equals}{rest}"
                elif not takes and " " not in word:  # else it may be a value, or argparse says what it is
                    raise self._unknown(word)
            option = self._option_string_actions.get(word)
            if option is not None and option.nargs == "?" and not _truth(words[place + 1 : place + 2]):
                word += f"={option.const}"
            yield word
            before = option

    def _unknown(self, word: str) -> InputError:
        if not word.startswith("-"):
            return InputError(f"{word}: is one argument too many for '{self.prog}'. Leave it out.")
        word = word.split("=")[0]
        return InputError(f"{word}: no such option of '{self.prog}'.{nearest(word, self._option_string_actions)}")

    def error(self, message: str) -> NoReturn:
        hint = ""
        if found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            hint = nearest(found[1], re.findall(r"[\w-]+", found[2]))
        elif found := re.match(r"argument ([^:/]+).*: expected (one|at least one) argument", message):
            after = [later for word, later in pairwise(self._words) if word == found[1]]
            dashed = any(word[:1] == "-" and word.split("=")[0] not in self._option_string_actions for word in after)
            hint = f" A value that begins with - is given as {found[1]}=VALUE." if dashed else ""
        elif found := re.match(r"the following arguments are required: ([A-Z]+)$", message):
            greedy = [name for name, action in self._option_string_actions.items() if action.nargs == "+"]
            hint = f" Give {found[1]} before {' and '.join(greedy)}, which takes every word after it." if greedy else ""
        raise InputError(f"{message} (see '{self.prog} --help'){'.' * bool(hint)}{hint}")


def _truth(words: Sequence[str]) -> bool:
    """Whether a word follows that may be the value of a boolean key, or a number of things."""
    return any(word.lower() in TRUTH or re.fullmatch(r"-?\d+", word) for word in words)
