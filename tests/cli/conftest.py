"""Inputs of commands, made once a file, and commands that draw no report and estimate no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from one_run import no_report
from tiny_runs import write_inputs
from zopro import cli
from zopro.loop import pipeline


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    few = (folder / "rows.jsonl").read_text().splitlines(keepends=True)[:24]
    (folder / "rows.jsonl").write_text("".join(few))
    return folder


@pytest.fixture
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    monkeypatch.setattr(pipeline, "estimate", lambda *opened: None)
    no_report(monkeypatch)
