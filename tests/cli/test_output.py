"""What stdout and stderr may be: full, closed, read no more, of a narrow encoding. One line at most, and no traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zopro import cli

ZOPRO = f"{sys.executable} -m zopro"


def shell(command: str, folder: Path, **variables: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of what a shell does with `zopro`."""
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        check=False,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("words", ["methods --json", "--help"])
def test_a_full_disk_at_stdout_is_one_line(words: str, tmp_path: Path) -> None:
    code, _, err = shell(f"{ZOPRO} {words} > /dev/full", tmp_path, PYTHONUNBUFFERED="")
    assert code == 1 and err.startswith("zopro: stopped: the disk is full, or a quota or size limit is reached (")
    assert err.count("\n") == 1


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-"])
def test_a_closed_stream_is_nowhere(closed: str, tmp_path: Path) -> None:
    assert shell(f"{ZOPRO} methods {closed}", tmp_path)[::2] == (0, "")


def test_an_error_does_not_go_to_stdout(tmp_path: Path) -> None:
    assert shell(f"{ZOPRO} methods --nope 2>&-", tmp_path)[:2] == (2, "")


@pytest.mark.parametrize("buffered", ["", "1"])
def test_who_reads_no_more_is_left_in_peace(buffered: str, tmp_path: Path) -> None:
    code, _, err = shell(f"{ZOPRO} methods --json | true", tmp_path, PYTHONUNBUFFERED=buffered)
    assert (code, err) == (141, "")


def test_an_error_that_nobody_reads_has_its_code(tmp_path: Path) -> None:
    assert shell(f"{ZOPRO} methods --nope 2>&1 | true", tmp_path)[0] == 2


def test_a_broken_pipe_of_something_else_is_our_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(args: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli.listing, "_methods", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["methods"])


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_characters_that_stdout_lacks_are_escaped(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = []
    for words in (["--out", "\u0142.yaml"], ["--json", "--out", "é\U0001f600.yaml"]):
        stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2))
        monkeypatch.setattr(sys, "stdout", stdout)
        monkeypatch.setattr(sys, "stderr", stderr)
        assert cli.main(["init", "chat", *words]) == 0
        assert not stderr.buffer.getvalue()
        printed.append(stdout.buffer.getvalue().decode())
    assert ("\\u0142.yaml written" in printed[0]) is (encoding != "utf-8")
    assert json.loads(printed[1])["config"] == "é\U0001f600.yaml"
