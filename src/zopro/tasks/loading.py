"""From options to examples: rows read, converted, shuffled by seed, and kept apart for training and evaluation."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from zopro.choices import TASKS
from zopro.errors import InputError
from zopro.tasks.base import DropRow, Example, Format, Message, Task
from zopro.tasks.beside import unread, with_tools
from zopro.tasks.folders import Split
from zopro.tasks.literals import blank
from zopro.tasks.own import own_task
from zopro.tasks.rows import Row, load_rows


class TaskOptions(Protocol):
    """What loading reads of `zopro.config.DataOptions`."""

    task: str
    train_data: str
    eval_data: str
    max_train_rows: int
    source_language: str
    target_language: str


@dataclass(frozen=True)
class TaskData:
    """train: rows to learn from, in seeded order. eval: one row per held-out prompt, none of which is in train.
    dropped: reason -> number of rows left out ("eval_data: " before reasons of the evaluation rows).
    unread: column that says something but was not read -> number of rows, of the `read` rows that were used.
    notes: `Example.notes` -> number of rows. splits: lines on which of several splits were read."""

    train: list[Example]
    eval: list[Example]
    dropped: dict[str, int]
    task: Task
    read: int = 0
    unread: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    splits: list[str] = field(default_factory=list)

    def remarks(self) -> list[str]:
        """One line for the columns that were not read, and one for each other thing to know of how rows were read."""
        named = {name or "one without a name": count for name, count in self.unread.items()}
        names = [
            name if count == self.read else f"{name} (in {count} of {self.read} rows)" for name, count in named.items()
        ]
        return [
            *self.splits,
            *([f"columns not read: {', '.join(names)}"] if names else []),
            *(f"{note}: {count} of {self.read} rows" for note, count in self.notes.items()),
        ]


def load(
    options: TaskOptions,
    eval_prompts: int,
    seed: int,
    refuse: Callable[[Example], str | None] | None = None,
    fit: Callable[[Example], Example] | None = None,
    columns: bool = False,
) -> TaskData:
    """Load the data of `options.task`.

    At most `eval_prompts` distinct prompts are for evaluation: from `options.eval_data`, or held out of the training
    rows where that is empty. Training rows with a prompt of the evaluation data (all of it, not only the rows used)
    are dropped and counted; prompts are compared as text, white space aside. Rows are shuffled with
    `random.Random(seed)`, then `options.max_train_rows` are kept. `refuse(example)` may return a reason to drop a row
    (a prompt that is too long); it is asked before rows are counted off, so that sizes hold. Before that, `fit(example)`
    may return another example in its place, or raise `DropRow` (see `zopro.tasks.Fit`). With `columns` examples keep the
    columns of their rows.

    Raises `InputError` for an unknown task, data that cannot be read, a row without the expected columns, values of
    the wrong type, and when nothing is left to train or to evaluate on.
    """
    task = _task(options)
    counts = _Counts()
    train = _examples(task, options.train_data, "train", refuse, fit, counts, columns)
    random.Random(seed).shuffle(train)
    if options.eval_data:
        held_out = _examples(task, options.eval_data, "eval", refuse, fit, counts, columns)
        random.Random(seed).shuffle(held_out)
        evaluation = _distinct(held_out, eval_prompts)
    else:
        held_out = evaluation = _distinct(train, eval_prompts)
    forbidden = {prompt_key(example) for example in held_out}
    kept = [example for example in train if prompt_key(example) not in forbidden]
    if not kept:
        raise InputError(
            f"{'eval_data' if options.eval_data else 'eval_prompts'}: must leave training prompts, but all "
            f"{len(forbidden)} distinct prompts are for evaluation. Give other rows or a smaller eval_prompts."
        )
    leaked = len(train) - len(kept) - (0 if options.eval_data else len(evaluation))
    if leaked:
        counts.dropped["prompt is held out for evaluation"] += leaked
    if options.max_train_rows:
        kept = kept[: options.max_train_rows]
    dropped, unread, notes = dict(counts.dropped), dict(counts.unread), dict(counts.notes)
    return TaskData(kept, evaluation, dropped, task, counts.read, unread, notes, counts.splits)


def _task(options: TaskOptions) -> Task:
    """The task of `options`. Raises InputError for a function of the user's that makes none."""
    make = TASKS[options.task].load()
    if options.task.startswith("python:"):
        return own_task(options.task, lambda: make(options))
    return cast(Task, make(options))


def load_prompts(
    source: str,
    count: int,
    seed: int,
    refuse: Callable[[Example], str | None] | None = None,
    fit: Callable[[Example], Example] | None = None,
) -> tuple[list[Example], dict[str, int], list[str]]:
    """At most `count` distinct prompts of `other_data`, in seeded order, reason -> number of rows left out, and
    `TaskData.splits`.

    Rows are of any task that has its prompt in a column of its own. `refuse`, `fit` and what is raised are as in `load`.
    """
    counts = _Counts()
    examples = _examples(TASKS["verifiable"].load()(None), source, "other", refuse, fit, counts, columns=True)
    random.Random(seed).shuffle(examples)
    return _distinct(examples, count), dict(counts.dropped), counts.splits


def prompt_key(example: Example) -> str:
    """The prompt as one text, by which prompts are compared: roles and contents, runs of white space as one space."""
    return "\n".join([*map(_turn_key, example.prompt), *map(_plain, [example.tools] if example.tools else [])])


def _turn_key(message: Message) -> str:
    calls = [_plain(message[name]) for name in ("tool_calls", "function_call") if message.get(name)]
    return " ".join([f"{message['role']}: {' '.join(message.get('content', '').split())}", *calls])


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def convert(task: Task, row: Row, split: Split = "train") -> Example:
    """The example of one row. Raises `DropRow` for one to leave out and `InputError` for one that must be fixed."""
    form = _format_of(task, row, split)
    try:
        return with_tools(replace(form.convert(row), row=row.number), row)
    except InputError as error:
        raise InputError(f"{split}_data: {row.place}: {error}.") from None


def _format_of(task: Task, row: Row, split: Split) -> Format:
    filled = {name for name, value in row.items() if not blank(value)}  # a table has the columns of all its rows
    for columns in (filled, row.keys()):
        for form in task.formats:
            if form.matches(columns):
                return form
    kind = next((what for names, what in _OTHER_KINDS if names <= row.keys()), _ALONE.get(tuple(row)))
    other = f" ({kind})" if kind else ""
    raise InputError(
        f"{split}_data: {row.place} has the columns {', '.join(map(str, row)) or '(none)'}{other}; "
        f"task {task.name} expects {' or '.join(map(str, task.formats))}. Rename the columns or choose another task."
    )


_OTHER_KINDS: tuple[tuple[set[str], str], ...] = (
    ({"prompt", "completion", "label"}, "TRL's unpaired preferences, one answer with a label; a pair is needed"),
    ({"prompt", "completions", "labels"}, "TRL's stepwise supervision; a pair of answers is needed"),
    ({"prompt", "completion"}, "TRL's prompts with one completion; a pair of answers is needed"),
    ({"messages"}, "conversations with one answer; a pair of answers is needed"),
    ({"conversations"}, "conversations with one answer; a pair of answers is needed"),
)
_ALONE: dict[tuple[str, ...], str] = {
    ("text",): "TRL's language modelling; a pair of answers is needed",
    ("prompt",): "TRL's prompts without an answer; a pair of answers is needed",
}


@dataclass
class _Counts:
    """What loading counts over both splits; see `TaskData`."""

    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0
    unread: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    splits: list[str] = field(default_factory=list)


def _examples(
    task: Task,
    source: str,
    split: Split,
    refuse: Callable[[Example], str | None] | None,
    fit: Callable[[Example], Example] | None,
    counts: _Counts,
    columns: bool,
) -> list[Example]:
    examples: list[Example] = []
    reasons: Counter[str] = Counter()
    for row in load_rows(source, split, counts.splits.append):
        try:
            example = convert(task, row, split)
            example = replace(example, columns=dict(row)) if columns else example
            example = _accepted(example, refuse, fit, row, split)
        except DropRow as drop:
            reasons[str(drop)] += 1
        else:
            examples.append(example)
            counts.unread.update(() if columns else unread(row))  # kept, they reach the reward
            counts.notes.update(example.notes)
    if not examples:
        why = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        raise InputError(f"{split}_data: '{source}' has no usable row ({why}). Check the data and the task.")
    counts.read += len(examples)
    prefix = "" if split == "train" else f"{split}_data: "
    counts.dropped.update({prefix + reason: count for reason, count in reasons.items()})
    return examples


def _accepted(
    example: Example,
    refuse: Callable[[Example], str | None] | None,
    fit: Callable[[Example], Example] | None,
    row: Row,
    split: Split,
) -> Example:
    try:
        example = example if fit is None else fit(example)
        reason = None if refuse is None else refuse(example)
    except InputError as error:
        raise InputError(f"{split}_data: {row.place}: {str(error).rstrip('.')}.") from None
    if reason:
        raise DropRow(reason)
    return example


def _distinct(examples: Iterable[Example], count: int) -> list[Example]:
    """The first `count` examples with different prompts, in order."""
    by_prompt: dict[str, Example] = {}
    for example in examples:
        if len(by_prompt) == count:
            break
        by_prompt.setdefault(prompt_key(example), example)
    return list(by_prompt.values())
