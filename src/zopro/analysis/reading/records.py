"""What a run directory says, as plain records: whatever of its files is there yet, and however they are broken."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeGuard

import yaml

from zopro.store import shown
from zopro.store.layout import Layout

Record = dict[str, Any]


def read_config(run: Path) -> Record:
    return read_object(Layout(run).config(), yaml.safe_load)


def start_of(config: Record) -> shown.Start:
    """What the run of a configuration calls the policy that iteration 0 begins with."""
    return shown.start(config.get("sft_steps"))


def read_metrics(run: Path) -> list[Record]:
    """The lines of metrics.jsonl, those of earlier versions with the names of today."""
    return [shown.named(line) for line in read_jsonl(Layout(run).metrics())]


def read_jsonl(path: Path) -> list[Record]:
    """The objects of a .jsonl file; a missing file gives none. What cannot be read is left out: `unread` says it."""
    return _records(path)[0]


def read_object(path: Path, parse: Callable[[str], Any] = json.loads) -> Record:
    """The object in a file; an empty one where there is none, or none that can be read."""
    return _object(path, parse) or {}


def unread(run: Path) -> list[str]:
    """What of a run is there and cannot be read, each with what a page lacks without it.

    A last line that is not finished is no damage: the run is writing it.
    """
    layout = Layout(run)
    objects = (
        (layout.config(), yaml.safe_load, "settings"),
        (layout.environment(), json.loads, "versions and machine"),
        (layout.summary(), json.loads, "seconds and memory"),
    )
    found = [f"{path.name} ({lacks})" for path, parse, lacks in objects if _object(path, parse) is None]
    lines = {layout.metrics(): "curves and evaluations"}
    lines |= dict.fromkeys(sorted(layout.evaluations().glob("*.jsonl")), "answers")
    for path, lacks in lines.items():
        records, lost = _records(path)
        some = f"{lost} line{'s' * (lost > 1)} of " if records else ""
        found += [f"{some}{path.relative_to(run)} ({lacks})"] * bool(lost)
    return found


def _records(path: Path) -> tuple[list[Record], int]:
    """The objects of a .jsonl file, and how many of its lines hold none; an empty file counts as such a line.

    Lines end at b"\\n" alone: texts may hold U+2028 and other characters that `str.splitlines` takes for an end.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError:
        return [], 1
    found = [_line(line.decode("utf-8", "replace")) for line in lines if line.strip()]
    records = [record for record in found if record is not None]
    unfinished = lines[-1].startswith(b"{") and found[-1] is None
    return records, len(found) - len(records) - unfinished if found else 1


def _line(text: str) -> Record | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _object(path: Path, parse: Callable[[str], Any]) -> Record | None:
    """The object in a file; an empty one where there is no file, None where it cannot be read."""
    try:
        value = parse(path.read_text("utf-8", "replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return value if isinstance(value, dict) else None


def latest_evaluations(metrics: Iterable[Record]) -> list[Record]:
    """One evaluation per iteration, SFT (iteration None) first; after a resume the later line counts."""
    found = {line.get("iteration"): line for line in metrics if line.get("stage") == "evaluation" and "reward" in line}
    return [found[key] for key in sorted(found, key=lambda i: -1 if i is None else i)]


def stage_seconds(metrics: Iterable[Record], summary: Record | None = None) -> list[Record]:
    """Seconds and peak memory so far of every finished stage, in the order they ended, with `share` of the longest.

    With the `summary` of a finished run what it has beside the stages comes last, so that all add up to its seconds.
    """
    ends = {
        (line.get("stage"), line.get("iteration")): line
        for line in metrics
        if line.get("event") == "end" and is_number(line.get("seconds"))
    }
    lines = list(ends.values())
    rest = ((summary or {}).get("stages") or {}).get("other")
    if summary and is_number(rest):
        lines.append({"stage": "other", "seconds": rest, "peak_rss_mb": summary.get("peak_rss_mb")})
    longest = max((line["seconds"] for line in lines), default=0) or 1
    return [{**line, "share": line["seconds"] / longest} for line in lines]


def costs(stages: Iterable[Record]) -> Record:
    """Seconds and peak memory of a run: of its stages, so that the page has them from one source."""
    lines = list(stages)
    peaks = [line["peak_rss_mb"] for line in lines if is_number(line.get("peak_rss_mb"))]
    return {"seconds": sum(line["seconds"] for line in lines), "peak_rss_mb": max(peaks, default=None)} if lines else {}


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
