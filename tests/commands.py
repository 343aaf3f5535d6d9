"""Commands as a person types them, in this process, and the one line that they answer with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tiny_runs import config
from zopro import cli


def typed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    """Exit code and last line of a command; an exception that it lets through fails the test as the traceback it is."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, (out if code == 0 else err).strip().splitlines()[-1] if out + err else ""


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    code, line = typed(capsys, *words)
    assert code == 2 and line.startswith("zopro: error: "), line
    return line.removeprefix("zopro: error: ")


def run(capsys: pytest.CaptureFixture[str], inputs: Path, folder: Path, *words: str, **options: Any) -> tuple[int, str]:
    settings = config(inputs, folder / "run", iterations=1, policy_steps=1).to_dict() | options
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return typed(capsys, "run", folder / "config.yaml", *words)


def refused_at_once(capsys: pytest.CaptureFixture[str], inputs: Path, folder: Path, **options: Any) -> str:
    """The line of a run that has written nothing."""
    code, line = run(capsys, inputs, folder, **options)
    assert code == 2 and line.startswith("zopro: error: "), line
    assert not (folder / "run").exists(), line
    return line.removeprefix("zopro: error: ")
