"""Answers that cost money or time, on the disk as they come: work that is done again asks for the rest only.

One JSON object a line, which names what was asked by its digest: texts and keys are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zopro.store.durable import append_line, whole_lines


def digest(*asked: Any) -> str:
    """sha256 of JSON values."""
    return hashlib.sha256(json.dumps(list(asked)).encode()).hexdigest()


def kept(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file, which need not be there. A line that cannot be read counts for nothing."""
    for line in whole_lines(path) if path.exists() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def keep(path: Path, value: dict[str, Any]) -> None:
    """Add an object; a crash of this process does not lose it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    append_line(path, json.dumps(value), flush=False)
