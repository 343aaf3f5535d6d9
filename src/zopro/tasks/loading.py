"""From options to examples: rows read, converted, shuffled by seed, and kept apart for training and evaluation."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from zopro.errors import InputError, nearest
from zopro.tasks import chat, preference, summarization, translation
from zopro.tasks.base import DropRow, Example, Format, Task
from zopro.tasks.rows import Row, Split, load_rows

TASKS: dict[str, Callable[[TaskOptions], Task]] = {
    "chat": chat.task,
    "summarization": summarization.task,
    "translation": translation.task,
    "preference": preference.task,
}
"""Every task: a new one is a module with `task(options) -> Task` and a row here."""


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
    dropped: reason -> number of rows left out ("eval_data: " before reasons of the evaluation rows)."""

    train: list[Example]
    eval: list[Example]
    dropped: dict[str, int]
    task: Task


def load(
    options: TaskOptions,
    eval_prompts: int,
    seed: int,
    refuse: Callable[[Example], str | None] | None = None,
) -> TaskData:
    """Load the data of `options.task`.

    At most `eval_prompts` distinct prompts are for evaluation: from `options.eval_data`, or held out of the training
    rows where that is empty. Training rows with a prompt of the evaluation data (all of it, not only the rows used)
    are dropped and counted; prompts are compared as text, white space aside. Rows are shuffled with
    `random.Random(seed)`, then `options.max_train_rows` are kept. `refuse(example)` may return a reason to drop a row
    (a prompt that is too long); it is asked before rows are counted off, so that sizes hold.

    Raises `InputError` for an unknown task, data that cannot be read, a row without the expected columns, values of
    the wrong type, and when nothing is left to train or to evaluate on.
    """
    if options.task not in TASKS:
        raise InputError(f"task: must be one of {', '.join(TASKS)}, got {options.task!r}.{nearest(options.task, TASKS)}")
    task = TASKS[options.task](options)
    dropped: Counter[str] = Counter()
    train = _examples(task, options.train_data, "train", refuse, dropped)
    random.Random(seed).shuffle(train)
    if options.eval_data:
        held_out = _examples(task, options.eval_data, "eval", refuse, dropped)
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
        dropped["prompt is held out for evaluation"] += leaked
    if options.max_train_rows:
        kept = kept[: options.max_train_rows]
    return TaskData(kept, evaluation, dict(dropped), task)


def prompt_key(example: Example) -> str:
    """The prompt as one text, by which prompts are compared: roles and contents, runs of white space as one space."""
    return "\n".join(f"{message['role']}: {' '.join(message['content'].split())}" for message in example.prompt)


def convert(task: Task, row: Row, split: Split = "train") -> Example:
    """The example of one row. Raises `DropRow` for one to leave out and `InputError` for one that must be mended."""
    form = _format_of(task, row, split)
    try:
        return replace(form.convert(row), row=row.number)
    except InputError as error:
        raise InputError(f"{split}_data: {row.place}: {error}.") from None


def _format_of(task: Task, row: Row, split: Split) -> Format:
    for form in task.formats:
        if form.matches(row):
            return form
    raise InputError(
        f"{split}_data: {row.place} has the columns {', '.join(map(str, row)) or '(none)'}; task {task.name} expects "
        f"{' or '.join(map(str, task.formats))}. Rename the columns or choose another task."
    )


def _examples(
    task: Task,
    source: str,
    split: Split,
    refuse: Callable[[Example], str | None] | None,
    dropped: Counter[str],
) -> list[Example]:
    examples: list[Example] = []
    reasons: Counter[str] = Counter()
    for row in load_rows(source, split):
        try:
            example = convert(task, row, split)
            if refuse is not None and (reason := _refusal(refuse, example, row, split)):
                raise DropRow(reason)
        except DropRow as drop:
            reasons[str(drop)] += 1
        else:
            examples.append(example)
    if not examples:
        why = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common(3))
        raise InputError(f"{split}_data: '{source}' has no usable row ({why}). Check the data and the task.")
    prefix = "" if split == "train" else "eval_data: "
    dropped.update({prefix + reason: count for reason, count in reasons.items()})
    return examples


def _refusal(refuse: Callable[[Example], str | None], example: Example, row: Row, split: Split) -> str | None:
    try:
        return refuse(example)
    except InputError as error:
        raise InputError(f"{split}_data: {row.place}: {str(error).rstrip('.')}.") from None


def _distinct(examples: Iterable[Example], count: int) -> list[Example]:
    """The first `count` examples with different prompts, in order."""
    by_prompt: dict[str, Example] = {}
    for example in examples:
        if len(by_prompt) == count:
            break
        by_prompt.setdefault(prompt_key(example), example)
    return list(by_prompt.values())
