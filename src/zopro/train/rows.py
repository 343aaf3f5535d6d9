"""Rows that a training or an evaluation cannot use get one line before it begins, as far as a look at them tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from zopro.errors import InputError
from zopro.text.chat import check_end
from zopro.train.arguments import check_enough

FIRST = 8  # rows whose prompts are looked at


def check_rows(rows: Any, name: str) -> None:
    """Raise InputError for rows that cannot be answered or rewarded, as far as the first ones, their columns and the
    number of prompts that are None tell.

    Args:
        rows: the data of a training or an evaluation; of a stream only its columns are looked at, where they are known.
        name: what they are called.
    """
    if isinstance(rows, str) or not (hasattr(rows, "__iter__") or hasattr(rows, "__getitem__")):
        raise InputError(f"{name}: must be a Dataset, got {rows!r:.60}. Use datasets.load_dataset.")
    columns = getattr(rows, "column_names", None)
    if columns and "prompt" not in columns:
        raise InputError(f"{name}: must have a column 'prompt', got {', '.join(columns)}. Rename it.")
    if taken := {"prompts", "completions"}.intersection(columns or ()):
        raise InputError(
            f"{name}: must not have a column {min(taken)!r}, by which reward functions get the trainer's own. "
            "Rename or remove it."
        )
    if not hasattr(rows, "__len__"):
        return
    if not len(rows):
        raise InputError(f"{name}: must have rows, got none. Add some.")
    missing = isinstance(rows, Dataset) and rows.data.column("prompt").null_count
    rows = rows.select_columns("prompt") if missing else rows  # all are read then, and what else they have is not
    for index in range(len(rows) if missing else min(FIRST, len(rows))):
        row = rows[index]
        prompt = row.get("prompt") if isinstance(row, Mapping) else row
        talk = isinstance(prompt, list) and prompt and all(isinstance(one, Mapping) and "role" in one for one in prompt)
        if not (talk or isinstance(prompt, str)):
            raise InputError(
                f"{name}: must have prompts that are texts or messages with a role, got {prompt!r:.60} in row "
                f"{index + 1}. Drop or mend such rows."
            )


def check_trained(rows: Any, evaluated: Any, args: Any) -> None:
    """`check_rows` for a training, by the arguments of a `trl.RLOOConfig`. Raises InputError for too few rows too."""
    check_rows(rows, "train_dataset")
    if hasattr(rows, "__len__"):
        check_enough(len(rows), args)
    if args.eval_strategy != "no":
        check_evaluated(evaluated)


def check_evaluated(rows: Any, held: Any = None) -> None:
    """`check_rows` for what is evaluated: rows, or a dict of them by names, or the name of some that a trainer holds."""
    if isinstance(rows, str) and isinstance(held, dict):
        return
    for name, own in rows.items() if isinstance(rows, dict) else [("", rows)]:
        check_rows(own, f"eval_dataset[{name!r}]" if name else "eval_dataset")


def check_encoded(prompt: Any, tokenizer: Any, processing_class: Any, given: Mapping[str, Any]) -> None:
    """Raise InputError for messages without a template, and for text at which the tokenizer ends the answer."""
    if isinstance(prompt, str):  # the chat template's own encoding adds nothing
        check_end(tokenizer, "processing_class")
    elif not (getattr(processing_class, "chat_template", None) or given.get("chat_template")):
        raise InputError(
            "processing_class: must have a chat template where prompts are messages, got none. Set its chat_template, or "
            "give prompts as texts."
        )


def check_text(rows: Sequence[Mapping[str, Any]], images: Any, fields: Mapping[str, Any]) -> None:
    """Raise InputError for prompts that have more than text, which an engine does not show the model.

    Args:
        rows: of one batch, with TRL's columns for images.
        images, fields: what TRL finds beside the tokens of their prompts.
    """
    empty: tuple[Any, ...] = (type(None), list)
    columns = [n for n in ("image", "images") if any(row.get(n) or not isinstance(row.get(n), empty) for row in rows)]
    others = sorted(fields.keys() - {"token_type_ids", "mm_token_type_ids"})  # text has these too
    if found := [*columns, *(["images in messages"] if images else others)]:
        raise InputError(
            f"train_dataset: must have prompts of text alone for ESTrainer, got {', '.join(found)}. Remove them, or use "
            "ZOPrOTrainer."
        )
