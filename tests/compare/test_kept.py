"""What earlier calls have left in a comparison's folder, damaged or in use: one line that names the file or its user."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from zopro.compare import Plan, compare, run
from zopro.compare.kept import finished, result_of
from zopro.compare.plan import Job
from zopro.config import RunConfig
from zopro.errors import InputError, Stopped
from zopro.store.durable import write_text
from zopro.system import progress
from zopro.system.screens import Plain

CONFIG = RunConfig(model="m", task="chat", train_data="x")
PLAN = Plan(("rloo",), steps=1, points=1, search_trials=1)
POINT = {"step": 1, "seconds": 1.0, "rewards": [0.5], "kl_per_answer": [0.1]}
TRAINED = {"points": [POINT], "steps": 1, "seconds": 1.0, "peak_mb": 100.0}
LACKING = [json.dumps({**TRAINED, "points": [point]}) for point in (1, {}, {**POINT, "rewards": 1})]
NOISE = ["", "noise", "[1]", "{}", "null", "[" * 9999]


@pytest.mark.parametrize("text", [*NOISE, *LACKING, json.dumps({**TRAINED, "peak_mb": None})])
@pytest.mark.parametrize("kind", ["prepare", "inference", "train"])
def test_a_damaged_result_is_named(kind: str, text: str, tmp_path: Path) -> None:
    path, whole = tmp_path / "result.json", kind == "inference" and text in LACKING  # which reads the memory alone
    path.write_text(text)
    if whole:
        assert result_of(path, Job(kind))["peak_mb"] == 100
        return
    with pytest.raises(InputError) as caught:
        result_of(path, Job(kind))
    assert str(caught.value) == (
        f"'{path}': must be as zopro has written it, got a damaged file. Delete it: its job is run again."
    )


def test_a_whole_result_comes_with_the_names_of_today(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**TRAINED, "points": [{"rewards": [0.5], "kl": [0.1]}]}))
    assert result_of(path, Job("train"))["points"] == [{"rewards": [0.5], "kl_per_answer": [0.1]}]
    path.write_text(json.dumps({"start": {"rewards": [0.5], "kl": [0.1]}}))
    assert result_of(path, Job("prepare"))["start"] == {"rewards": [0.5], "kl_per_answer": [0.1]}


@pytest.mark.parametrize("text", [*NOISE, '{"plan": {}}', '{"plan": {}, "methods": {"es": {"curve": []}}}'])
def test_a_damaged_comparison_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(InputError, match=r"compare\.json': must .* Delete it: it is made again from the jobs\.$"):
        finished(tmp_path / "compare.json", PLAN)
    with pytest.raises(InputError, match=r"compare\.json': must"):
        compare(replace(CONFIG, output_dir=str(tmp_path)), PLAN, quiet=True)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return replace(CONFIG, output_dir=str(tmp_path / "out"))


def test_a_comparison_names_the_result_that_is_damaged(config: RunConfig) -> None:
    path = Path(config.output_dir) / "jobs" / Job("prepare").name / "result.json"
    write_text(path, "{")
    with pytest.raises(InputError, match=r"result\.json': must .* Delete it: its job is run again"):
        compare(config, PLAN, quiet=True)


def test_one_process_compares_in_a_folder_from_start_to_end(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FileLock(str(Path(config.output_dir) / ".lock"), timeout=0)  # as another process opens it
    locked: list[bool] = []

    def launch(described: Path, log: Any) -> int:
        with pytest.raises(Timeout):
            lock.acquire()
        locked.append(True)
        return 1

    monkeypatch.setattr(run, "_launch", launch)
    with pytest.raises(run.JobFailed):
        compare(config, PLAN, quiet=True)
    assert locked == [True]
    with lock, pytest.raises(InputError, match=r"^output_dir: must be used by one process at a time, got .*out, which"):
        compare(config, PLAN, quiet=True)
    assert locked == [True], "nothing has run"


@pytest.mark.parametrize(
    ("code", "last", "kind", "message"),
    [
        (2, "zopro: error: model: must be there, got 'a\u2028b'.", InputError, "model: must be there, got 'a\u2028b'."),
        (1, "zopro: stopped: the memory is full.", Stopped, "the memory is full. (see "),
        (1, "ValueError: 1", run.JobFailed, "ValueError: 1 (see "),
        (-9, "Loading weights: 100%", Stopped, "a process was killed by SIGKILL; most likely the memory was full. "),
        (-11, "Loading weights: 100%", Stopped, "a process was killed by SIGSEGV (see "),
    ],
)
def test_why_a_job_has_ended(
    code: int, last: str, kind: type, message: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its log's last line as a whole says so, but not of one that was killed."""

    def launch(described: Path, log: Any) -> int:
        log.write(f"a line\n{last}\n")
        return code

    monkeypatch.setattr(run, "_launch", launch)
    with pytest.raises(kind) as caught:
        compare(config, PLAN, quiet=True)
    assert type(caught.value) is kind and str(caught.value).startswith(message)


def test_what_a_job_s_process_says_is_shown_where_it_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho 'policy 0: 1/2 steps in 3 s'\necho 'a warning' >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(Plain, "between", 0.0)
    described = tmp_path / "train-guided-0" / "job.json"
    with (tmp_path / "log.txt").open("w") as log, progress.reporting():
        assert run._launch(described, log) == 3
    assert re.search(r"^train-guided-0, \d s: policy 0: 1/2 steps in 3 s$", capsys.readouterr().err, re.MULTILINE)
    assert (tmp_path / "log.txt").read_text() == "a warning\n"
