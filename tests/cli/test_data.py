"""`zopro data`: rows to a file or to stdout, and one line for what cannot be made."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from commands import refused, typed
from zopro import cli
from zopro.tasks.generated import arithmetic, countdown


def test_rows_go_to_a_file_or_to_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "train.jsonl"
    asked = ("data", "countdown", "--numbers", 4, "--rows", 5, "--seed", 2, "--split", "test")
    rows = countdown(5, "test", 2, 4)
    assert typed(capsys, *asked, "--out", out) == (0, f"5 rows written to {out}")
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    assert cli.main([*map(str, asked)]) == 0
    assert capsys.readouterr().out == out.read_text()
    found = json.loads(typed(capsys, "data", "arithmetic", "--rows", 3, "--difficulty", 3, 4, "--json")[1])
    assert found["data"] == arithmetic(3, difficulties=[3, 4]) and found["rows"] == 3


def test_one_is_no_plural(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (one := tmp_path / "one.jsonl").touch()
    two, three, config = (tmp_path / name for name in ("two.jsonl", "three.jsonl", "config.yaml"))
    assert typed(capsys, "data", "arithmetic", "--rows", 1, "--out", two) == (0, f"1 row written to {two}")
    found = {"pairs": 1, "prompts": 1, "cut_off": 0, "chosen_reward": 0.5, "rejected_reward": 0.25}
    monkeypatch.setattr("zopro.loop.own_pairs.own_pairs", lambda *asked: ([], found))
    monkeypatch.setattr("zopro.loop.beforehand.check_beforehand", lambda config: None)
    config.write_text(f"model: x/y\ntask: preference\ntrain_data: {one}\nreward: ['length:1-2']\n")
    said = typed(capsys, "pairs", config, "--out", three)[1]
    assert said.startswith(f"1 pair of 1 prompt written to {three}:")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["countdown", "--rows", "0"], "--rows: must be at least 1, got 0."),
        (["countdown", "--rows", "3", "--numbers", "7"], "--numbers: must be from 2 to 6, got 7."),
        (
            ["countdown", "--rows", "3", "--difficulty", "1"],
            "--difficulty: is an option of 'arithmetic', not of 'countdown'.",
        ),
        (["arithmetic", "--rows", "3", "--difficulty", "5"], "--difficulty: must be among 1, 2, 3, 4, got 5."),
        (["arithmetic", "--rows", "3", "--numbers", "3"], "--numbers: is an option of 'countdown', not of 'arithmetic'."),
        (["arithmetic", "--rows", "3", "--seed", "-1"], "--seed: must not be negative, and less than 2^63, got -1."),
        (
            ["arithmetic", "--rows", "3", "--out", "a.jsonl/"],
            "--out: must be a new .jsonl file, got 'a.jsonl/', which has",
        ),
        (["arithmetic", "--rows", "3", "--split", "dev"], "--split: must be train or test, got 'dev'."),
        (["arithmetic", "--rows", "3", "--out", "a.csv"], "--out: must be a new .jsonl file, got 'a.csv'"),
        (["algebra", "--rows", "3"], "argument KIND: invalid choice: 'algebra'"),
        (["arithmetic"], "the following arguments are required: --rows"),
    ],
)
def test_bad_input_gets_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "data", *words).startswith(line)


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "train.jsonl"
    out.write_text("mine")
    assert "which is there already" in refused(capsys, "data", "arithmetic", "--rows", 3, "--out", out)
    below = refused(capsys, "data", "arithmetic", "--rows", 3, "--out", out / "a.jsonl")
    assert below.startswith("--out: must be a file that can be written, got") and out.read_text() == "mine"


def test_a_link_to_nothing_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link = tmp_path / "train.jsonl"
    link.symlink_to("elsewhere/later.jsonl")
    assert typed(capsys, "data", "arithmetic", "--rows", 3, "--out", link)[0] == 0
    assert link.is_symlink() and len((tmp_path / "elsewhere/later.jsonl").read_text().splitlines()) == 3


def test_who_reads_the_first_rows_only_hears_no_complaint() -> None:
    words = [sys.executable, "-m", "zopro", "data", "arithmetic", "--rows", "3000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["difficulty"] in (1, 2)
        process.stdout.close()
        assert process.stderr.read() == b""
