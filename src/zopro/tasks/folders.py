"""Which files of a folder are those of a split, by their names.

train.jsonl        train-00000-of-00002.parquet        data/test_1.csv.gz
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from zopro.errors import InputError

Split = Literal["train", "eval", "other"]
_HELD_OUT = ("test", "validation", "valid", "dev", "eval")
PREFIXES: dict[str, tuple[str, ...]] = {"train": ("train",), "eval": _HELD_OUT, "other": _HELD_OUT}
_SHARD = re.compile(r"[-_]\d+[-_]of[-_]\d+(-[0-9a-f]+)?$|[-_.]?\d+$")
"""What follows a split's name in those of its files."""
_REMEDY = "Name the file itself, or a folder with those that are meant."


def files_of(folder: Path, split: Split, say: Callable[[str], None], readable: Callable[[Path], bool]) -> list[Path]:
    """The files of a split, those of hidden folders aside; `say` takes a line about which of several is read.

    Raises `InputError`: there is none, or several splits that may be meant, or one in two forms.
    """
    visible = [f for f in folder.rglob("*") if not any(part.startswith(".") for part in f.relative_to(folder).parts)]
    files = sorted(f for f in visible if readable(f) and f.is_file())
    for prefix in PREFIXES[split]:
        splits: dict[str, list[Path]] = {}
        for file in files:
            if file.name.startswith(prefix):
                splits.setdefault(_SHARD.sub("", _parts(file)[0]), []).append(file)
        if len(splits) > 1 and prefix not in splits:
            names = ", ".join(file.name for group in splits.values() for file in group[:2])
            raise InputError(
                f"{split}_data: '{folder}' must hold one split that begins with {prefix}, or one called just {prefix}, "
                f"got the files {names}. {_REMEDY}"
            )
        if splits:
            name = chosen([*splits], prefix, split, say)
            if twice := _in_two_forms(splits[name]):
                raise InputError(
                    f"{split}_data: '{folder}' must hold the split {name} in one form, got the files {twice}. {_REMEDY}"
                )
            return splits[name]
    if any(file.suffix == ".arrow" for file in visible):
        raise InputError(
            f"{split}_data: '{folder}' must hold {PREFIXES[split][0]}.parquet or another such file, got a data set as "
            "save_to_disk writes it. Write it with to_parquet."
        )
    found = ", ".join(file.relative_to(folder).as_posix() for file in files[:8]) or "no data file"
    raise InputError(
        f"{split}_data: no file in '{folder}' begins with {' or '.join(PREFIXES[split])}; "
        f"found {found}. Name the file itself."
    )


def chosen(splits: list[str], prefix: str, split: Split, say: Callable[[str], None]) -> str:
    """Of the splits whose names begin with `prefix` the one of that name, else the first."""
    found = prefix if prefix in splits else splits[0]
    if len(splits) > 1:
        say(f"{split}_data: of the splits {', '.join(splits)} one is read: {found}")
    return found


def _in_two_forms(files: Sequence[Path]) -> str:
    """The names of two files that may hold the same rows: of two formats, or one of them compressed; else nothing."""
    formats = {_parts(file)[1]: file for file in reversed(files)}
    if len(formats) > 1:
        return ", ".join(file.name for file in formats.values())
    names: dict[Path, Path] = {}
    for file in files:
        if (other := names.setdefault(file.parent / _parts(file)[0], file)) != file:
            return f"{other.name}, {file.name}"
    return ""


def _parts(file: Path) -> tuple[str, str]:
    """A file's name without its ending, and that in lower case, .gz aside."""
    name = file.name[: -len(".gz")] if file.name.lower().endswith(".gz") else file.name
    stem, _, ending = name.rpartition(".")
    return stem, ending.lower()
