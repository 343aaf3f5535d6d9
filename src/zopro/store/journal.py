"""The journal of a zeroth-order iteration: the few bytes a step that rebuild its policy (`zopro.loop.replay`).

`RUN/iterations/NNN/journal.jsonl` has one JSON object a line. The first says where the steps start and what their
directions are made of; each further one is a step: its `StepRecord`, the mean reward and the rows of the data it used.
The tensors that a step leaves out are named where they differ from those of the line before. Every line ends with a
CRC-32 of what stands before it and is on the disk before its step changes a parameter. A last line that a crash has
truncated counts for nothing; any earlier damage is refused with its line number.

    python -c "from zopro.store.journal import read; print(read('RUN/iterations/001/journal.jsonl').header.start)"
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from zopro.errors import InputError
from zopro.store.durable import append_line, keep_lines, whole_lines, write_text
from zopro.zo.records import StepRecord

FORMAT = 1
_LINE = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}')
_JOINED = re.compile(rb'"crc32": "[0-9a-f]{8}"\}.\{', re.DOTALL)  # two lines, the end of the first damaged: no crash
_RECORD = [field.name for field in dataclasses.fields(StepRecord)]
_LATER = ("momentum", "second_moment", "anchor")  # of the record's fields, those that a line may lack
_WORDS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # JSON has no such numbers


@dataclass(frozen=True)
class Header:
    """Where a journal's steps start, and what their directions are made of. Folders are relative to the run."""

    iteration: int
    method: str
    start: str  # the folder of the policy before the first step
    directions: dict[str, Any]  # kind, of `zopro.choices.DIRECTIONS`, targeted, or a class; arguments
    files: dict[str, str]  # sha256 of each tensor file that the steps depend on
    untrained: list[str] = field(default_factory=list)  # tensors of the start's files that no step changes
    unsaved: list[str] = field(default_factory=list)  # trained tensors that the start's files do not hold
    device: str = "cpu"  # generators of CPUs and GPUs differ
    threads: int = 1  # so do sums, with the number of threads
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


@dataclass(frozen=True)
class Step:
    """One step: what `SPSA` did, the mean reward of its answers, and which rows of the data they answer."""

    record: StepRecord
    reward: float | None = None
    rows: list[int] = field(default_factory=list)
    exchanged_bytes: int = 0  # handed by one rank to the others; 0 for a single process


@dataclass(frozen=True)
class Journal:
    """What a journal says; `truncated`: its last line was truncated by a crash and is left out."""

    header: Header
    steps: list[Step]
    truncated: bool


def encode(value: dict[str, Any]) -> str:
    """`value` as a line of JSON with its checksum, without the line's end.

    >>> encode({"step": 0})
    '{"step": 0, "crc32": "4aadb3ac"}'
    """
    body = json.dumps(_written(value), ensure_ascii=True, allow_nan=False)[:-1]
    return f'{body}, "crc32": "{zlib.crc32(body.encode()):08x}"}}'


def decode(line: bytes) -> dict[str, Any]:
    """The value of a line. Raises ValueError: its checksum does not fit what it says."""
    match = _LINE.fullmatch(line)
    if match is None:
        raise ValueError("is not a line of a journal")
    if zlib.crc32(match[1]) != int(match[2], 16):
        raise ValueError("does not have the checksum it was written with")
    value: dict[str, Any] = _read(json.loads(match[1] + b"}"))
    return value


def read(path: str | Path) -> Journal:
    """Read a journal; nothing is changed.

    Raises:
        InputError: there is none, it is damaged before its last line (the message has file and line), a step is
            missing, or a later version of zopro wrote it.
    """
    path = Path(path)
    try:
        lines, truncated = whole_lines(path), not path.read_bytes().endswith(b"\n")
    except OSError as error:
        raise InputError(f"journal: must be a readable file, got '{path}' ({error.strerror}).") from None
    if not lines:
        raise InputError(f"journal: must begin with a header, got '{path}', which has no whole line.")
    values: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            before = values[-1].record.left_out if number > 2 else []
            values.append(_header(decode(line)) if number == 1 else _step(decode(line), number - 2, before))
        except (ValueError, TypeError, KeyError) as error:
            if not truncated and number == len(lines) > 1 and not _JOINED.search(line):
                return Journal(values[0], values[1:], True)
            reason = error if isinstance(error, ValueError) else "lacks something a step has"
            raise InputError(
                f"journal: {path} is damaged: line {number} {reason}. Restore the file, or delete iteration "
                f"{path.parent.name} (its policy and what follows) and run again with --resume."
            ) from None
    return Journal(values[0], values[1:], truncated)


class JournalWriter:
    """Appends steps to a journal.

    Args:
        path: the file. It is begun anew with `header`, or, where `keep` steps of it are wanted, cut off after them.
        header: what the first line says.
        keep: steps taken before, which the file must hold.

    Raises:
        InputError: `keep` steps are wanted of a journal that has fewer, is damaged or has another header.
        OSError: the disk refuses.
    """

    def __init__(self, path: Path, header: Header, keep: int = 0) -> None:
        self.path = path
        self._left_out: list[str] = []
        if keep == 0:
            write_text(path, encode(asdict(header)) + "\n")
            return
        journal = read(path)
        if _lasting(journal.header) != _lasting(header):
            raise InputError(
                f"journal: {path} was begun from other files or settings than are here now. Restore them, or delete it "
                f"and {path.parent.name}'s folder under RUN/trainer to train this iteration again."
            )
        if len(journal.steps) < keep:
            raise InputError(f"journal: {path} must hold the {keep} steps of the checkpoint, got {len(journal.steps)}.")
        keep_lines(path, 1 + keep)
        self._left_out = journal.steps[keep - 1].record.left_out

    def write(self, step: Step) -> None:
        """Append one step; it is on the disk when this returns. Raises OSError where the disk refuses."""
        line = step_line(step)
        if line["left_out"] == self._left_out:  # as in the line before
            del line["left_out"]
        append_line(self.path, encode(line))
        self._left_out = step.record.left_out


def step_line(step: Step) -> dict[str, Any]:
    """A step as the flat object that its line holds; of what earlier versions did not write, only what is not 0."""
    record = {name: value for name, value in asdict(step.record).items() if value or name not in _LATER}
    return {**record, "reward": step.reward, "rows": step.rows, "exchanged_bytes": step.exchanged_bytes}


def _header(value: dict[str, Any]) -> Header:
    if value.get("format") != FORMAT:
        raise ValueError(f"is of format {value.get('format')}, this version of zopro reads {FORMAT}")
    return Header(**value)


def _step(value: dict[str, Any], expected: int, left_out: list[str]) -> Step:
    if value["step"] != expected:
        raise ValueError(f"is step {value['step']}, where step {expected} is due")
    value.setdefault("left_out", left_out)
    record = StepRecord(**{name: value[name] for name in _RECORD if name in value or name not in _LATER})
    return Step(record, value["reward"], value["rows"], value.get("exchanged_bytes", 0))


def _lasting(header: Header) -> Header:
    return dataclasses.replace(header, versions={})


def _written(value: Any) -> Any:
    """`value` with numbers that JSON does not have as words."""
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_written(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _read(value: Any) -> Any:
    """The inverse of `_written`, for what journals hold."""
    if isinstance(value, dict):
        return {key: _read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_read(item) for item in value]
    return _WORDS.get(value, value) if isinstance(value, str) else value
