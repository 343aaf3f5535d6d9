"""Exceptions of which the command line prints one line: bad input (exit code 2), a machine that gives out (1)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Storage size calculation overflowed", re.I)


class InputError(ValueError):
    """Bad input: one clear line that names the argument, the rule, the value received and the remedy.

    >>> from zopro import RunConfig
    >>> try:
    ...     RunConfig(model="HuggingFaceTB/SmolLM2-135M-Instruct", task="chat", train_data="rows.jsonl", iterations=0)
    ... except InputError as error:
    ...     print(error)
    iterations: must be greater than 0, got 0.
    """


class Stopped(RuntimeError):
    """The work cannot go on through no fault of its input (a full disk): one line with the cause and the remedy."""


class Diverged(InputError):
    """A training's numbers became NaN, infinite or useless. `diverging` names the key that is at fault.

    Args:
        what: what was found.
        rate: the learning rate, where it is known; for callers from Python, whose key is `learning_rate`.
    """

    def __init__(self, what: str, rate: float | None = None) -> None:
        rule = "" if rate is None else f"learning_rate: must be low enough to train with, got {rate:g}: "
        super().__init__(rule + what)
        self.what = what


@contextmanager
def diverging(key: str, value: float) -> Iterator[None]:
    """Raise `InputError` in place of `Diverged` (or what sampling raises), naming the learning rate of the stage inside.

    >>> with diverging("sft_learning_rate", 1e20):
    ...     raise Diverged("the loss is nan")
    Traceback (most recent call last):
        ...
    zopro.errors.InputError: sft_learning_rate: must be low enough to train with, got 1e+20: the loss is nan. ...
    """
    try:
        yield
    except (Diverged, FloatingPointError) as error:
        raise InputError(
            f"{key}: must be low enough to train with, got {value:g}: {str(getattr(error, 'what', error)).rstrip('.')}. "
            "Nothing of this stage was saved. Lower it in a new output_dir."
        ) from error


def out_of_memory(error: BaseException | None) -> BaseException | None:
    """The cause of `error` that says that the memory is exhausted; None if there is none."""
    while error is not None:
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's, unimported
        if known or (isinstance(error, RuntimeError) and _MEMORY.search(str(error))):
            return error
        error = error.__cause__ or error.__context__
    return None


def one_line(error: BaseException) -> str:
    """An error's text as one line without control characters: names in it may come from anyone's data."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(error).split()))


def nearest(word: str, known: Iterable[str], written: Mapping[str, str] | None = None) -> str:
    """Return `` Did you mean 'x'?`` for the closest known word, or an empty string if none is close.

    `written`: how words are written in full, where they are.
    """
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{(written or {}).get(matches[0], matches[0])}'?" if matches else ""


def pip_install(extra: str) -> str:
    """The command that installs the packages of an extra of zopro, in the versions that it asks for.

    The packages are named, and not "zopro[extra]": pip would look for that on its index, where a checkout is not.

    >>> pip_install("openai")
    "pip install 'openai>=1.50'"
    """
    from importlib.metadata import PackageNotFoundError, requires

    try:
        needed = [line.partition(";") for line in requires("zopro") or ()]
    except PackageNotFoundError:  # run from its source alone
        needed = []
    of_extra = f"extra == '{extra}'"
    packages = [f"'{package.strip()}'" for package, _, marker in needed if marker.replace('"', "'").strip() == of_extra]
    return "pip install " + " ".join(packages) if packages else f"pip install '.[{extra}]' in zopro's folder"
