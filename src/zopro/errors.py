"""Exceptions of which the command line prints one line: bad input (exit code 2), a machine that gives out (1)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one clear line that names the argument, the rule, the value received and the remedy."""


class Stopped(RuntimeError):
    """The work cannot go on through no fault of its input (a full disk): one line with the cause and the remedy."""


class Diverged(ValueError):
    """A training's numbers became NaN or infinite. `diverging` names the key that is at fault."""


@contextmanager
def diverging(key: str, value: float) -> Iterator[None]:
    """Raise `InputError` in place of `Diverged`, naming the learning rate of the stage inside.

    >>> with diverging("sft_learning_rate", 1e20):
    ...     raise Diverged("the loss is nan")
    Traceback (most recent call last):
        ...
    zopro.errors.InputError: sft_learning_rate: must be low enough to train with, got 1e+20: the loss is nan. ...
    """
    try:
        yield
    except Diverged as error:
        raise InputError(
            f"{key}: must be low enough to train with, got {value:g}: {error}. Nothing of this stage was saved. Lower it "
            "in a new output_dir; zopro export takes along what is finished here."
        ) from error


def nearest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{matches[0]}'?" if matches else ""
