"""Inputs of commands, made once a file, and commands that draw no report."""

from __future__ import annotations

from pathlib import Path

import pytest

from one_run import no_report
from tiny_runs import write_inputs
from zopro import cli


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    no_report(monkeypatch)
