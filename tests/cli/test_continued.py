"""`--resume` finds the run that is meant: RUN/config.yaml the one it lies in, another file the one that it names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import refused, typed
from tiny_runs import config
from zopro import cli
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.store.rundir import check_folder, followed

pytestmark = pytest.mark.usefixtures("quietly")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations of runs that begin or go on."""
    seen: list[RunConfig] = []

    def run(config: RunConfig, **options: Any) -> dict[str, Any]:
        seen.append(config)
        return {"run": config.output_dir}

    monkeypatch.setattr("zopro.loop.pipeline.run", run)
    monkeypatch.setattr("zopro.demo.table", str)
    return seen


@pytest.fixture
def moved(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was begun in runs/a of another folder, as its file says."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "moved"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config(inputs, Path("runs/a")).to_dict()))
    (run / "environment.json").write_text("{}")
    return run


def test_a_run_is_continued_where_its_own_file_is(moved, seen, capsys, monkeypatch):
    assert typed(capsys, "run", "moved/config.yaml", "--resume")[0] == 0
    monkeypatch.chdir(moved)
    assert typed(capsys, "run", "config.yaml", "--resume")[0] == 0
    assert [settings.output_dir for settings in seen] == [str(moved)] * 2


def test_a_link_s_parent_is_the_folder_that_it_leads_to(moved, seen, capsys, tmp_path):
    (tmp_path / "deep/real").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep/real")
    moved.rename(tmp_path / "deep/moved")
    assert typed(capsys, "run", "link/../moved/config.yaml", "--resume")[0] == 0
    assert seen[0].output_dir == str(tmp_path / "deep/moved")


def test_what_a_demo_has_made_is_found_where_it_is_now(moved, inputs, seen, capsys):
    shutil.copytree(inputs, moved / "demo")
    old = {"model": "/old/place/demo/model", "train_data": "/old/place/demo/rows.jsonl"}
    settings = yaml.safe_load((moved / "config.yaml").read_text()) | old
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    for words in ((), ("--model", "moved/demo/model")):
        assert typed(capsys, "run", "moved/config.yaml", "--resume", *words)[0] == 0
    again = followed(seen[0], moved)
    assert (again.model, again.train_data) == (str(moved / "demo/model"), str(moved / "demo/rows.jsonl"))
    line = refused(capsys, "run", "moved/config.yaml", "--resume", "--model", inputs / "model")
    assert "belongs to another config (model is " in line


def test_a_folder_that_is_typed_wins_and_another_file_says_it_itself(moved, seen, capsys):
    assert typed(capsys, "run", "moved/config.yaml", "--resume", "--output-dir", "there")[0] == 0
    (moved / "config.yaml").rename("mine.yaml")
    (moved / "environment.json").rename("environment.json")
    assert typed(capsys, "run", "mine.yaml", "--resume")[0] == 0
    assert [settings.output_dir for settings in seen] == ["there", "runs/a"]


def test_without_resume_a_file_is_only_a_file(moved, seen, capsys):
    assert typed(capsys, "run", "moved/config.yaml")[0] == 0
    assert seen[0].output_dir == "runs/a"


def test_a_run_that_was_stopped_before_it_began_says_so_and_begins(moved, seen, capsys):
    """It left a folder with its environment, or none."""
    (moved / "config.yaml").rename("mine.yaml")
    for folder, begins in (("moved", True), ("new", True), ("runs/a", False)):
        if not begins:
            Path(folder).mkdir(parents=True)
            Path(folder, "config.yaml").write_text(Path("mine.yaml").read_text())
        assert cli.main(["run", "mine.yaml", "--resume", "--output_dir", folder]) == 0
        said = f"nothing to continue in {folder}: the run begins anew" in capsys.readouterr().err
        assert said is begins
    assert len(seen) == 3


def test_a_run_without_a_name_cannot_be_continued(moved, seen, capsys):
    (moved / "environment.json").unlink()
    settings = yaml.safe_load((moved / "config.yaml").read_text()) | {"output_dir": ""}
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    line = refused(capsys, "run", "moved/config.yaml", "--resume")
    assert line.startswith("--resume: must be given with the output_dir of the run, got none.")
    assert not seen


def test_a_path_corrected_with_the_sign_of_home_and_an_emptied_key_are_the_run_s_own(moved, monkeypatch, tmp_path):
    """As docs/reliability.md says where a model was moved."""
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = yaml.safe_load((moved / "config.yaml").read_text()) | {"model": "~/m", "eval_data": None, "eps": "1e-3"}
    (moved / "config.yaml").write_text(yaml.safe_dump(settings))
    asked = RunConfig.from_dict(settings | {"output_dir": str(moved)})
    assert asked.model == str(tmp_path / "m") and check_folder(moved, asked, resume=True)
    for there, here in ((1, True), (True, 1), (False, 1)):
        (moved / "config.yaml").write_text(yaml.safe_dump(settings | {"easy_questions": there}))
        other = RunConfig.from_dict(settings | {"easy_questions": here})
        with pytest.raises(InputError, match=f"another config .easy_questions is {there} there, {here} here"):
            check_folder(moved, other, resume=True)
