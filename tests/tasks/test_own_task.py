"""A task of the user's: what it is made of and what its formats make of rows, held to what a run expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Format, Task, ask, columns, make_example
from zopro.tasks.loading import convert
from zopro.tasks.own import own_task
from zopro.tasks.rows import Row

ROW = {"asked": "Tea?", "good": "Yes, please", "bad": "No"}


def from_row(row: Row) -> Example:
    return make_example(ask(row["asked"]), row["good"], row["bad"])


def task(convert: Callable[[Row], Any] = from_row, **given: Any) -> Task:
    parts = {"formats": (Format(columns("asked", "good"), convert),), "default_judge": "chrf", **given}
    return own_task("python:mine:task", lambda: Task("qa", **parts))


def read(convert_row: Callable[[Row], Any]) -> Example:
    return convert(task(convert_row), Row(ROW, "rows.jsonl", 3))


def test_a_task_as_it_should_be_reads_as_it_does_alone() -> None:
    assert read(from_row) == Example(ask("Tea?"), "Yes, please", "No", row=3)
    assert read(lambda row: Example(ask("Tea?"), "Yes", score="0.5", reference="r")).score == 0.5


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"formats": ()}, r"formats of 'python:mine:task' must be a tuple of zopro.tasks.base.Format, .* got \(\)"),
        ({"formats": Format(columns("asked"), from_row)}, "formats of .* must be a tuple"),
        (
            {"formats": (Format(("asked", "good"), from_row),)},
            "formats of .* columns of zopro.tasks.base.columns, got",
        ),
        ({"metric": "bleu"}, "metric of .* must be one of rouge, chrf, or None, got 'bleu'"),
        ({"reward": "pairs"}, "reward of .* must be pairwise or regression, got 'pairs'"),
        ({"default_judge": "rogue"}, "default_judge of .* must be one of rouge, .*python:MODULE:FUNCTION, got 'rogue'"),
        ({"default_judge": "auto"}, "default_judge of .* got 'auto'"),
    ],
)
def test_a_part_that_cannot_be_used_is_known_before_a_row_is_read(given: dict[str, Any], what: str) -> None:
    with pytest.raises(InputError, match=f"^task: {what}"):
        task(**given)


@pytest.mark.parametrize(
    ("convert_row", "what"),
    [
        (lambda row: row["no"], "python:mine:task must read the row, or raise DropRow .*, but raised KeyError: 'no'"),
        (lambda row: make_example("Tea?", "Yes", "No"), "python:mine:task must read the row, .* TypeError"),
        (lambda row: None, "python:mine:task must make a zopro.tasks.base.Example of the row, got NoneType"),
        (lambda row: Example("Tea?", "Yes"), "prompt: must be a list of messages, as .*ask makes one, got 'Tea.'"),
        (lambda row: Example([{"rol": "user"}], "Yes"), "prompt: each message must have role and content"),
        (lambda row: Example(ask("Tea?"), 3), "chosen: must be text, got int"),
        (lambda row: Example(ask("Tea?"), "Yes", reference=["Yes"]), "reference: must be text, got list"),
        (lambda row: Example(ask("Tea?"), "Yes", score="x"), "score: must be a number, got 'x'"),
    ],
)
def test_what_a_format_does_wrong_is_one_line_with_the_row(convert_row: Callable[[Row], Any], what: str) -> None:
    with pytest.raises(InputError, match=f"^train_data: 'rows.jsonl' row 3: {what}.*[.]$"):
        read(convert_row)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (Example([], "Yes"), "empty prompt"),
        (Example(ask(" "), "Yes"), "empty prompt"),
        (Example(ask("Tea?"), " "), "empty answer"),
        (Example(ask("Tea?"), "Yes", "Yes"), "chosen and rejected are equal"),
        (Example(ask("Tea?"), "Yes", score=float("nan")), "score is not finite"),
    ],
)
def test_an_example_that_teaches_nothing_is_left_out(made: Example, reason: str) -> None:
    with pytest.raises(DropRow, match=f"^{reason}$"):
        read(lambda row: made)
