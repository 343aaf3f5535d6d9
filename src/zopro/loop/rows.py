"""Whether a run that is continued has the rows that it began with; else its numbers would be of two data sets.

rows = told(data)
check_same(run.store, run.config, rows)     # then keep(run.store, rows)
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.data import Data, Item
from zopro.store.durable import read_json
from zopro.store.rundir import RunDirectory, write_text

Told = dict[str, dict[str, Any]]
"""Of the held-out rows (first, as their prompts do not train), the training rows and those of another task: how many they
are, and the hash of what they say in their order, to models and to reward functions. Of their messages, not of the text
that a chat template makes of them, which may have the date in it."""


def told(data: Data) -> Told:
    return {"eval": _told(data.eval), "train": _told(data.train), "other": _told(data.other, columns=False)}


def _told(items: Iterable[Item], columns: bool = True) -> dict[str, Any]:
    found, rows = sha256(), 0
    for example in (item.example for item in items):
        answers = example.chosen, example.rejected, example.score, example.reference
        said = example.prompt, example.tools, *answers, example.columns if columns else None
        found.update(json.dumps(said, sort_keys=True, default=str).encode() + b"\n")
        rows += 1
    return {"rows": rows, "sha256": found.hexdigest()}


def check_same(store: RunDirectory, config: RunConfig, rows: Told) -> None:
    """Raise `InputError` where a run began with other rows; of a run of an earlier version nothing is known."""
    path = store.layout.data()
    begun = read_json(path) if path.exists() else rows
    keys = {"train": "train_data", "eval": "eval_data" if config.eval_data else "train_data", "other": "other_data"}
    for part, now in rows.items():
        before = begun.get(part)
        if before != now:
            count = before.get("rows") if isinstance(before, dict) else None
            counts = "" if count == now["rows"] else f" ({now['rows']} rows, {count} at first)"
            what = {"train": "to train on", "eval": "that are held out", "other": "of another task"}[part]
            raise InputError(
                f"{keys[part]}: must give the rows that the run began with, in their order, got others {what}"
                f"{counts}. Restore them, or begin a run in another output_dir. Where only a template's date or a "
                f"library has changed which prompts fit max_prompt_length, delete {path}."
            )


def keep(store: RunDirectory, rows: Told) -> None:
    """What the rows are as the run begins."""
    if store.writes and not store.layout.data().exists():
        write_text(store.layout.data(), json.dumps(rows))
