"""What earlier calls have left in a comparison's folder: results of jobs, and methods that are compared already."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from zopro.compare.plan import Job, Plan
from zopro.errors import InputError
from zopro.store.rundir import write_text
from zopro.store.shown import PER_ANSWER, named

SAMPLES = "samples"  # to each held-out prompt, of the start's measurement
_RENAMED = {"learning_rates": "search_trials"}  # what earlier versions called a plan's options
_NUMBERS = {"prepare": (), "inference": ("peak_mb",), "train": ("peak_mb", "seconds", "steps")}


def result_of(path: Path, job: Job) -> dict[str, Any]:
    """What a finished job has found, with the names of today. Raises InputError: the file is damaged."""
    with _whole(path, "its job is run again"):
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in _NUMBERS[job.kind]:
            float(found[key])
        if job.kind == "prepare":
            found["start"] = named(found["start"])
            fmean(found["start"]["rewards"])
            int(found["start"].get(SAMPLES, 1))
        if job.kind == "train":
            found["points"] = list(map(named, found["points"]))
            for point in found["points"]:
                fmean([*point["rewards"], *point[PER_ANSWER]])
        return found


def once(path: Path, keys: Sequence[str], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` found, or had found before and left in `path`, by at least these keys. Raises InputError: the file is
    damaged."""
    if not path.exists():
        found = work()
        write_text(path, json.dumps(found))
        return found
    with _whole(path, "it is made again"):
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {**{key: kept[key] for key in keys}, **kept}


def finished(path: Path, plan: Plan) -> dict[str, Any]:
    """Methods of the comparison in `path`, if there is one, that this plan does not name and would have run alike; with
    the names of today. Raises InputError: the file is damaged."""
    if not path.exists():
        return {}
    with _whole(path, "it is made again from the jobs"):
        earlier = json.loads(path.read_text(encoding="utf-8"))
        free = {"methods": [], "seeds": 0, "against": ""}
        before = {_RENAMED.get(name, name): value for name, value in earlier["plan"].items()}
        methods = {name: _renamed(method) for name, method in earlier["methods"].items() if name not in plan.methods}
    return methods if {"answers": 0, **before, **free} == {**asdict(plan), **free} else {}


def _renamed(method: dict[str, Any]) -> dict[str, Any]:
    return {**method, **{key: list(map(named, method[key])) for key in ("curve", "search")}}


@contextmanager
def _whole(path: Path, then: str) -> Iterator[None]:
    """Raise InputError in place of what a damaged file makes of the block. then: what happens once it is deleted."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise InputError(f"'{path}': must be as zopro has written it, got a damaged file. Delete it: {then}.") from None
