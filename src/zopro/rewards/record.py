"""What a saved reward model says beside its weights: reward.json."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from zopro.errors import InputError

RECORD_FILE = "reward.json"


def read_record(folder: str | Path) -> dict[str, Any]:
    """max_length, offset, score_mean and score_std. Raises `InputError` where they are missing or no numbers."""
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        raise InputError(f"{folder}: must be a folder written by RewardModel.save, but has no {RECORD_FILE}.")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        optional = [record[name] for name in ("score_mean", "score_std") if record[name] is not None]
        if all(math.isfinite(number) for number in (record["max_length"], record["offset"], *optional)):
            return dict(record)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise InputError(f"{path}: must hold max_length, offset, score_mean and score_std as numbers, and does not.")
