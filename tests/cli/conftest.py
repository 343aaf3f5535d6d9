"""Inputs of commands, made once a file, and commands that draw no report."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny_runs import write_inputs
from zopro import cli
from zopro.loop import pipeline


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    monkeypatch.setattr(pipeline.write, "refresh", lambda run: None)
    monkeypatch.setattr(pipeline.write, "finish", lambda run: None)
