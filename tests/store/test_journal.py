"""The journal's lines: what is written is read, a truncated end is no line, any earlier damage is named."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zopro.errors import InputError
from zopro.store.journal import Header, Journal, JournalWriter, Step, decode, encode, read, step_line
from zopro.zo import SPSA, StepRecord

HEADER = Header(1, "zopro", "policy/000", {"kind": "gaussian"}, {"policy/000/adapter_model.safetensors": "00"})


def record(step: int, loss: float = 0.5) -> StepRecord:
    return StepRecord(step, 7, [0.1], [0.2], [1e-3], [1e-5], [0.0], loss, math.nan, False)


def written(path: Path, count: int = 4) -> list[Step]:
    writer = JournalWriter(path, HEADER)
    steps = [Step(record(step), 0.25 * step, [step, step + 1]) for step in range(count)]
    for step in steps:
        writer.write(step)
    return steps


def test_steps_with_moments_are_read(tmp_path: Path) -> None:
    step = Step(dataclasses.replace(record(0), momentum=0.9, second_moment=0.99, anchor=0.01))
    JournalWriter(tmp_path / "journal.jsonl", HEADER).write(step)
    assert repr(read(tmp_path / "journal.jsonl").steps) == repr([step])


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "iterations/001/journal.jsonl"
    steps = written(path)
    journal = read(path)
    assert repr(journal) == repr(Journal(HEADER, steps, truncated=False))
    for line in path.read_text().splitlines():
        assert list(json.loads(line))[-1] == "crc32", "plain JSON for everyone else"


numbers = st.floats(allow_nan=True, allow_infinity=True)
lists = st.lists(numbers, max_size=3)


FIELDS = [st.just(0), st.integers(0), *[lists] * 5, numbers, numbers, st.booleans(), st.just([])]
SHARES = st.floats(0, 1, exclude_max=True).map(lambda share: share or 0.0)  # not -0.0, which a line does not hold


@given(st.builds(StepRecord, *FIELDS, SHARES, SHARES, SHARES))
def test_every_number_comes_back_to_the_bit(taken: StepRecord) -> None:
    back = decode(encode(step_line(Step(taken))).encode())
    assert repr(StepRecord(**{f.name: back[f.name] for f in dataclasses.fields(StepRecord) if f.name in back})) == repr(
        taken
    )
    old = ("momentum", "second_moment", "anchor")
    assert [name for name in old if name in back] == [name for name in old if getattr(taken, name)], "old lines stay"


@given(st.dictionaries(st.text(), st.text() | st.integers(), min_size=1), st.data())
def test_any_changed_byte_is_noticed(value: dict[str, object], data: st.DataObject) -> None:
    line = encode({f"key {name}": item for name, item in value.items()}).encode()
    at = data.draw(st.integers(0, len(line) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda new: new != line[at]))
    with pytest.raises(ValueError, match=r"checksum|not a line"):
        decode(line[:at] + bytes([byte]) + line[at + 1 :])


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_truncated_last_line_is_no_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    steps = written(path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert repr(read(path)) == repr(Journal(HEADER, steps[:3], truncated=True))
    writer = JournalWriter(path, HEADER, keep=3)
    writer.write(steps[3])
    assert repr(read(path)) == repr(Journal(HEADER, steps, truncated=False))


def test_a_last_line_of_rubbish_is_truncated_too(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    steps = written(path)
    path.write_bytes(path.read_bytes()[:-20] + b"\0" * 19 + b"\n")
    assert repr(read(path)) == repr(Journal(HEADER, steps[:3], truncated=True))


@pytest.mark.parametrize("line", [1, 2, 4])
def test_earlier_damage_is_refused_with_file_and_line(tmp_path: Path, line: int) -> None:
    path = tmp_path / "journal.jsonl"
    written(path)
    lines = path.read_bytes().split(b"\n")
    lines[line - 1] = lines[line - 1].replace(b"0", b"1", 1)
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match=rf"{path} is damaged: line {line} does not have the checksum"):
        read(path)


def test_a_missing_step_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    written(path)
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(lines[:2] + lines[3:]))
    with pytest.raises(InputError, match="line 3 is step 2, where step 1 is due"):
        read(path)


def test_continuing_drops_what_came_after(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    steps = written(path)
    JournalWriter(path, HEADER, keep=2)
    assert repr(read(path).steps) == repr(steps[:2])
    with pytest.raises(InputError, match="must hold the 3 steps of the checkpoint, got 2"):
        JournalWriter(path, HEADER, keep=3)
    with pytest.raises(InputError, match="begun from other files"):
        JournalWriter(path, dataclasses.replace(HEADER, start="sft"), keep=2)
    JournalWriter(path, HEADER)
    assert read(path).steps == []


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), (b"", "begin with a header"), (b"{}", "begin")])
def test_no_journal_is_one_line(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "journal.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(path)


def test_spsa_tells_before_it_moves() -> None:
    weight = torch.zeros(3)
    seen = []
    optimiser = SPSA([weight], lr=0.1, before_apply=lambda record: seen.append((record, weight.clone())))
    optimiser.step(lambda: weight.sum())
    assert seen[0][0] is optimiser.last and not seen[0][1].any() and weight.any()


def test_a_step_that_cannot_be_written_is_not_taken() -> None:
    def full(record: StepRecord) -> None:
        raise OSError(28, "No space left on device")

    weight = torch.zeros(3)
    optimiser = SPSA([weight], lr=0.1, before_apply=full)
    with pytest.raises(OSError, match="No space"):
        optimiser.step(lambda: weight.sum())
    assert not weight.any() and optimiser.step_count == 0


few = settings(max_examples=40)
taken_steps = st.lists(st.builds(StepRecord, *FIELDS), min_size=1, max_size=4).map(
    lambda taken: [Step(dataclasses.replace(one, step=number), one.loss, [number]) for number, one in enumerate(taken)]
)


@contextmanager
def journal_of(steps: list[Step]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.jsonl"
        writer = JournalWriter(path, HEADER)
        for step in steps:
            writer.write(step)
        yield path


@few
@given(taken_steps, st.data())
def test_a_tail_truncated_at_any_byte_leaves_a_prefix(steps: list[Step], data: st.DataObject) -> None:
    with journal_of(steps) as path:
        whole = path.read_bytes()
        assert repr(read(path)) == repr(Journal(HEADER, steps, truncated=False))
        header = whole.index(b"\n") + 1
        cut = data.draw(st.integers(header, len(whole)))
        path.write_bytes(whole[:cut])
        kept = whole[:cut].count(b"\n") - 1
        assert repr(read(path).steps) == repr(steps[:kept])
        writer = JournalWriter(path, HEADER, keep=kept)
        for step in steps[kept:]:
            writer.write(step)
        assert path.read_bytes() == whole


@few
@given(taken_steps, st.data())
def test_a_changed_byte_anywhere_is_refused_or_costs_the_last_line_alone(steps: list[Step], data: st.DataObject) -> None:
    with journal_of(steps) as path:
        whole = path.read_bytes()
        at = data.draw(st.integers(0, len(whole) - 1))
        byte = data.draw(st.integers(0, 255).filter(lambda new: new != whole[at]))
        path.write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        last = whole[:-1].rindex(b"\n") + 1
        if at < last or byte == ord("\n"):
            number = whole[:at].count(b"\n") + 1
            with pytest.raises(InputError, match=rf"{path} is damaged: line {number} "):
                read(path)
        else:
            journal = read(path)
            assert journal.truncated and repr(journal.steps) == repr(steps[:-1])


def test_what_a_step_left_out_is_named_where_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    left = [[], [], ["a", "b"], ["a", "b"], ["b"], []]
    steps = [Step(dataclasses.replace(record(step), left_out=names)) for step, names in enumerate(left)]
    writer = JournalWriter(path, HEADER)
    for step in steps[:4]:
        writer.write(step)
    writer = JournalWriter(path, HEADER, keep=3)  # as after a crash
    for step in steps[3:]:
        writer.write(step)
    assert [step.record.left_out for step in read(path).steps] == left
    assert [b"left_out" in line for line in path.read_bytes().splitlines()[1:]] == [False, False, True, False, True, True]
