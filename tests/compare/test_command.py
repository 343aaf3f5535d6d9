"""Where `zopro compare` writes: what was typed, else what its file says, but never into the run that the file is of."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from zopro import cli
from zopro.compare import command, run
from zopro.compare.shared import shared_config
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.store.layout import Layout

RUN = {"model": "m", "task": "chat", "train_data": "x", "output_dir": "run"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folder of each comparison, none of which is made; and a run, with a copy of its configuration outside of it."""
    found: list[str] = []

    def compared(config: Any, plan: Any) -> Any:
        found.append(config.output_dir)
        raise InputError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    monkeypatch.setattr("zopro.compare.compare", compared)
    Path("run").mkdir()
    Path("run/environment.json").write_text("{}")
    for path in ("run/config.yaml", "config.yaml"):
        Path(path).write_text(yaml.safe_dump(RUN))
    return found


def compared(*words: str) -> int:
    return cli.main(["compare", "--methods", "rloo", *words, "--steps", "1"])


def test_a_run_s_folder_is_not_compared_in(folders: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["run/config.yaml"], ["config.yaml"]):
        for typed in ([], ["--out", "a"], ["--output_dir", "b"], ["--out", "a", "--output-dir", "a/"]):
            assert compared(*words, *typed) == 2
    assert folders == ["", "a", "b", "a"] * 2
    monkeypatch.chdir("run")  # whence the folder has another name
    assert compared("config.yaml") == 2 and folders.pop() == ""
    monkeypatch.chdir("..")
    Path("run/environment.json").unlink()
    assert compared("config.yaml") == 2 and folders.pop() == "run", "of no run: as the file says"


def test_what_a_comparison_needs_is_looked_at_before_anything_is_written(
    folders: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("zopro.compare.compare", run.compare)
    for words, message in (
        (["config.yaml", "--out", "run"], "output_dir: must not be a run's folder, got run. Choose another."),
        (["run/config.yaml", "--out", "a", "--methods", "python:json:absent"], "method: 'json' has no 'absent'"),
        (["config.yaml", "--out", "a", "--methods", "python:math:pi"], "method: must be a zopro.choices.Method"),
    ):
        assert compared(*words) == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in Path("run").iterdir()) == ["config.yaml", "environment.json"]
    assert not Path("a").exists()


def test_what_a_comparison_does_not_heed_is_refused(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (
            ["--policy_steps", "3"],
            "--policy_steps: must be given with --start iteration, which trains them. Leave it out.",
        ),
        (["--eval_greedy"], "--eval_greedy: is a run's alone; a comparison measures sampled answers. Leave it out."),
        (["--steps", "-1"], "--steps: must be greater than 0, got -1."),
        (["--points", "0"], "--points: must be at least 1, got 0."),
        (["--methods", "rloo,rloo"], "--methods: must name each method once, got rloo,rloo."),
    ):
        assert cli.main(["compare", "config.yaml", "--methods", "rloo", "--steps", "1", *words]) == 2
        assert capsys.readouterr().err.strip().startswith(f"zopro: error: {message}")
    assert folders == []
    assert compared("config.yaml", "--start", "iteration", "--policy_steps", "3", "--out", "a") == 2 and folders == ["a"]


def test_a_comparison_from_sft_goes_on_with_other_policy_steps(tmp_path: Path) -> None:
    config = RunConfig(**{**RUN, "output_dir": str(tmp_path)})
    begun = shared_config(config, tmp_path, "sft")
    Path(begun.output_dir).mkdir()
    Layout(begun.output_dir).config().write_text(yaml.safe_dump(begun.to_dict()))
    other = replace(config, policy_steps=config.policy_steps + 1)
    assert shared_config(other, tmp_path, "sft").policy_steps == config.policy_steps
    assert shared_config(other, tmp_path, "iteration").policy_steps == other.policy_steps


def test_two_folders_are_refused(folders: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compared("config.yaml", "--out", "a", "--output_dir", "b") == 2 and folders == []
    assert "--out: must be --output_dir where both are given, got 'a' and 'b'. Give one." in capsys.readouterr().err


def test_a_demo_that_was_moved_is_compared_with_its_own_model(tmp_path: Path) -> None:
    (tmp_path / "demo" / "model").mkdir(parents=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**RUN, "model": "/gone/demo/model"}))
    args = argparse.Namespace(config=str(tmp_path / "config.yaml"), out=None)
    assert command._configured(args).model == str(tmp_path / "demo" / "model")
