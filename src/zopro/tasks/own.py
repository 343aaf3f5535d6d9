"""`task: python:MODULE:FUNCTION`: a task of one's own, held to what every stage expects of a task and of its examples.

own_task("python:my_module:task", lambda: task(options))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from zopro.choices import JUDGES, made_by
from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Format, Task, as_number, make_example, whole_text
from zopro.tasks.messages import message_list
from zopro.tasks.metrics import METRICS
from zopro.tasks.rows import Row


def own_task(name: str, make: Callable[[], Any]) -> Task:
    """The task that `make` makes. Raises `InputError`: it makes none, or one of which a part cannot be used.

    Whatever goes wrong in its formats is an `InputError`, or a `DropRow`.
    """
    task: Task = made_by(name, make, Task, "task: must be a function from options to a zopro.tasks.base.Task")
    judges = [judge for judge in JUDGES if judge != "auto"]
    rules: tuple[tuple[str, bool, str], ...] = (
        (
            "formats",
            _usable(task.formats),
            "a tuple of zopro.tasks.base.Format, each with columns of zopro.tasks.base.columns",
        ),
        ("metric", task.metric in (None, *METRICS), f"one of {', '.join(METRICS)}, or None"),
        ("reward", task.reward in ("pairwise", "regression"), "pairwise or regression"),
        ("default_judge", task.default_judge in JUDGES and task.default_judge != "auto", f"one of {', '.join(judges)}"),
    )
    for key, fits, rule in rules:
        if not fits:
            raise InputError(f"task: {key} of {name!r} must be {rule}, got {getattr(task, key)!r:.80}.")
    return replace(task, formats=tuple(replace(form, convert=_checked(form.convert, name)) for form in task.formats))


def _usable(formats: Any) -> bool:
    if not isinstance(formats, tuple | list) or not all(isinstance(form, Format) for form in formats):
        return False
    groups = [group for form in formats for group in (form.columns, *form.columns)]
    return bool(formats) and not any(isinstance(group, str) for group in groups)


def _checked(convert: Callable[[Row], Any], name: str) -> Callable[[Row], Example]:
    def read(row: Row) -> Example:
        try:
            made = convert(row)
        except (DropRow, InputError):
            raise
        except (Exception, SystemExit) as error:  # whatever the user's code raises
            why = f"{type(error).__name__}: {error}"
            raise InputError(f"{name} must read the row, or raise DropRow to leave it out, but raised {why}") from error
        if not isinstance(made, Example):
            raise InputError(f"{name} must make a zopro.tasks.base.Example of the row, got {type(made).__name__}")
        prompt = message_list(made.prompt, "prompt")
        if prompt is None:
            raise InputError(
                f"prompt: must be a list of messages, as zopro.tasks.base.ask makes one, got {made.prompt!r:.60}"
            )
        for column in ("chosen", "rejected", "reference"):
            if (text := getattr(made, column)) is not None:
                whole_text(text, column)
        make_example(prompt, made.chosen, made.rejected)  # raises what it raises
        return replace(made, prompt=prompt, score=None if made.score is None else as_number(made.score, "score"))

    return read
