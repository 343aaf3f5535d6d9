"""What is read of a run's files: every line of them, and what is damaged by its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zopro.analysis.page.answers import samples
from zopro.analysis.reading.records import read_metrics, unread

LINE = {"stage": "evaluation", "iteration": None, "reward": 0.5}
SEPARATORS = "\u2028\u2029\u0085\u000b\u001c"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "config.yaml").write_text("sft_steps: 4\n")
    for name in ("environment.json", "summary.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(LINE) + "\n")
    answer = {"prompt": f"a{SEPARATORS}b", "completion": f"c{SEPARATORS}d"}
    (tmp_path / "evaluations/001.jsonl").write_text(json.dumps(answer, ensure_ascii=False) + "\n", "utf-8")
    return tmp_path


def test_a_text_may_hold_what_unicode_calls_the_end_of_a_line(run: Path) -> None:
    (sample,) = samples(run)
    assert sample.prompt == f"a{SEPARATORS}b" and sample.answers[0].text == f"c{SEPARATORS}d"
    assert unread(run) == []


LACKING = {
    "config.yaml": "settings",
    "environment.json": "versions and machine",
    "summary.json": "seconds and memory",
    "metrics.jsonl": "curves and evaluations",
    "evaluations/001.jsonl": "answers",
}


@pytest.mark.parametrize("name", LACKING)
@pytest.mark.parametrize("noise", [b"", b"\x00\xff{", b"[1]", b"[1]\n", b"[" * 9999 + b"\n", b"\n", b"{\n"])
def test_a_damaged_file_is_named(name: str, noise: bytes, run: Path) -> None:
    (run / name).write_bytes(noise)
    assert unread(run) == [f"{name} ({LACKING[name]})"]


def test_a_folder_in_place_of_a_file_is_named(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    assert unread(run) == ["metrics.jsonl (curves and evaluations)"] and read_metrics(run) == []


def test_damaged_lines_are_counted_and_one_that_is_being_written_is_not(run: Path) -> None:
    whole, metrics = json.dumps(LINE), run / "metrics.jsonl"
    metrics.write_text(f'{whole}\n{whole}\n{{"stage": "poli')
    assert len(read_metrics(run)) == 2 and unread(run) == []
    metrics.write_text(f"{whole}\n{whole[:9]}\n\n{whole}\n7\n{whole[:5]}")
    assert len(read_metrics(run)) == 2 and unread(run) == ["2 lines of metrics.jsonl (curves and evaluations)"]
    metrics.write_text('{"stage": "poli')
    assert unread(run) == []


def test_what_is_not_there_yet_is_no_damage(tmp_path: Path) -> None:
    assert unread(tmp_path) == []
