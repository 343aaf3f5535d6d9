"""`zopro init` writes what `zopro run` takes as it is; `run --help` shows what people change first."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from zopro import cli
from zopro.choices import TASKS
from zopro.cli.init import SHIPPED
from zopro.config.arguments import FIRST
from zopro.config.reading import FIELDS, load_config
from zopro.tasks import load


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("task", TASKS)
def test_what_it_writes_is_a_configuration(task: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").touch()
    Path('folder "of mine"').mkdir()
    given = [] if task in SHIPPED else ["--data", "rows.jsonl"]
    written = printed(capsys, "init", task, *given, "--model", 'folder "of mine"')
    config = load_config(written["config"])
    assert (config.task, config.model) == (task, 'folder "of mine"')
    assert config.max_kl > 0, "a first run does not go where nothing is left of the model"
    text = Path(written["config"]).read_text()
    assert all(f"{key}:" in text for key in FIRST if key in FIELDS)
    if task in SHIPPED:
        data = load(config, config.eval_prompts, config.seed)
        assert len(data.eval) == config.eval_prompts and not data.dropped.keys() - {"prompt is held out for evaluation"}


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["chess"], "TASK: must be one of chat, "),
        (["python:my_module:task"], "TASK: must be one of chat, "),
        (["summarization"], "--data: must be given for task summarization"),
        (["chat", "--out", "there.yaml"], "--out: must be a new file, but 'there.yaml' is there already"),
        (
            ["chat", "--out", "there.yaml/x.yaml"],
            "--out: must be a file that can be written, got 'there.yaml/x.yaml' (Not a",
        ),
        (["chat", "--out", "sub/"], "--out: must be a new file, got the folder 'sub/'. Give a name in it."),
        (["chat", "--model", "./no/such"], "--model: no folder and no Hub id of that name can be read, got './no/such'."),
        (["chat", "--out", "other.yaml"], "--out: must be a new file, but 'other-rows.jsonl' is there already"),
    ],
)
def test_what_it_does_not_do(argv: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("there.yaml").touch()
    Path("other-rows.jsonl").touch()
    before = sorted(Path().iterdir())
    assert cli.main(["init", *argv]) == 2
    assert capsys.readouterr().err.startswith(f"zopro: error: {line}")
    assert sorted(Path().iterdir()) == before


def test_the_file_says_how_it_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("rows.jsonl").touch()
    assert cli.main(["init", "verifiable", "--data", "rows.jsonl"]) == 0
    assert capsys.readouterr().out.endswith(
        "verifiable.yaml, with a --reward that needs no answer if the rows have none\n"
    )
    assert cli.main(["init", "chat", "--out", "sub/my own.yaml"]) == 0
    assert Path("sub/my own.yaml").read_text().startswith("# A first run: zopro run 'sub/my own.yaml'. Every key")
    assert capsys.readouterr().out.endswith("Then: zopro run 'sub/my own.yaml'\n")


@pytest.mark.parametrize(("number", "code"), [(errno.EIO, 2), (errno.ENOSPC, 1)])
def test_no_rows_are_left_without_their_file(number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from zopro.store import durable

    def write(path: Path, text: str) -> None:
        if path.suffix == ".yaml":
            raise OSError(number, os.strerror(number), str(path))
        path.write_text(text)

    monkeypatch.setattr(durable, "write_text", write)
    assert cli.main(["init", "chat"]) == code
    assert not list(Path().iterdir())


def test_help_shows_what_people_change_first_and_help_all_the_rest(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, shown in (("--help", set(FIRST) & set(FIELDS)), ("--help-all", set(FIELDS))):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["run", flag])
        assert stopped.value.code == 0
        words = {word[2:] for word in capsys.readouterr().out.split() if word.startswith("--")}
        assert words & set(FIELDS) == shown
