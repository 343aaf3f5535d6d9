"""`zopro analyse` as a user types it: what it writes, what it prints, and its one line on bad input."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

import one_run
from walks import lora_walk
from zopro import cli
from zopro.analysis import command, write
from zopro.analysis.analyse import analyse
from zopro.analysis.numbers import projection
from zopro.analysis.page.figures import table
from zopro.analysis.reading.checkpoints import of_folder
from zopro.errors import InputError

FIGURES = {
    "angle-between-updates-degrees",
    "angle-between-updates-degrees-by-layer-product",
    "trajectory-pca-2d-product",
    "trajectory-pca-3d-factors",
}
METRICS = {
    "update_angle_degrees",
    "velocity_angle_degrees",
    "update_pearson",
    "update_distance_correlation",
    "policy_momentum_cosine",
}


@pytest.fixture(autouse=True)
def plainly(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(write, "_figures", lambda *args: None)


@pytest.fixture
def few_figures(monkeypatch):
    """One figure of each kind is drawn; the names of all."""
    return one_run.few_figures(monkeypatch, *FIGURES)


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    for seed, name in enumerate(("policy", "reward")):
        lora_walk(tmp_path / name, seed=seed, steps=3)
    return ["--policy", "policy", "--reward", "reward"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folders of a run, with nothing else in it."""
    policy = lora_walk(tmp_path / "walk", steps=2, seed=1).folder
    reward = lora_walk(tmp_path / "walk2", steps=2, seed=2).folder
    run = tmp_path / "run"
    (run / "policy").mkdir(parents=True)
    (run / "reward").mkdir()
    for step, name in ((0, "sft"), (5, "policy/000"), (10, "policy/001")):
        (policy / f"checkpoint-{step}").rename(run / name)
    for step in range(3):
        (reward / f"checkpoint-{5 * step}").rename(run / "reward" / f"{step:03d}")
    return run


def refused(capsys, *argv: str) -> str:
    before = sorted(Path().rglob("*"))
    assert cli.main(["analyse", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("zopro: error: ") and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err.removeprefix("zopro: error: ").strip()


def test_two_folders(folders, few_figures, capsys):
    assert cli.main(["analyse", *folders, "--out", "here", "--projections", "pca", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    written = json.loads(Path("here/analysis.json").read_text())
    assert {key: printed[key] for key in written} == written
    for name in METRICS:
        assert {len(values) for values in written["metrics"][name].values()} == {3}
        assert set(written["metrics"][name]) == {"factors", "product"}
    assert written["metrics"]["velocity_angle_degrees"]["product"][0] is None
    assert isinstance(written["metrics"]["procrustes_disparity"]["factors"], float)
    assert Path(printed["report"]).is_file()
    pictures = {path.name for path in Path("here/figures").iterdir()}
    assert pictures == {f"{name}.{suffix}" for name in FIGURES for suffix in ("png", "svg")}
    assert len(few_figures) == len(set(few_figures)) == 26, "each has a name of its own"


def test_a_run_gets_its_analysis_beside_it(run, no_figures, capsys, monkeypatch):
    monkeypatch.setattr(projection, "available", lambda: ["pca"])
    assert cli.main(["analyse", "run"]) == 0
    out = capsys.readouterr().out
    assert "update_angle_degrees" in out and "by chance (95 %), last" in out and "run/report.html" in out
    numbers = json.loads((run / "analysis.json").read_text())
    assert numbers["iterations"] == [0, 1]
    printed = [line.split()[:3] for line in out.splitlines()]
    cells = [[row.name, *row.cells] for row in table(numbers, numbers) if row.name in METRICS]
    assert len(cells) == 2 * len(METRICS) and all(row in printed for row in cells), "the numbers of the report's table"
    assert cli.main(["analyse", "run", "--out", "other", "--seed", "3"]) == 0
    assert Path("other/report.html").is_file()


def test_a_run_in_progress_keeps_going(run, caplog):
    write.refresh(run)
    assert (run / "analysis.json").is_file() and (run / "report.html").is_file()
    (run / "policy/000/adapter_model.safetensors").write_bytes(b"broken")
    write.refresh(run)
    assert "policy/000/adapter_model.safetensors" in caplog.text
    assert not (run / "analysis.json").exists()
    assert "trajectory-data" not in (run / "report.html").read_text()


def test_a_damaged_run_is_not_shown_as_whole(run, no_figures, caplog):
    """One line says what the report lacks; a line that the run is writing is none of it."""
    (run / "metrics.jsonl").write_text('{"stage": "policy"}\n{"stage": "po')
    assert cli.main(["analyse", "run", "--projections", "pca"]) == 0 and caplog.text == ""
    (run / "metrics.jsonl").write_text('{"stage": "policy"}\nnoise\n')
    (run / "summary.json").write_text("[1]")
    assert cli.main(["analyse", "run", "--projections", "pca"]) == 0
    (said,) = caplog.messages
    assert "run: summary.json (seconds and memory), 1 line of metrics.jsonl (curves and evaluations)." in said


def test_a_report_of_another_run_is_not_replaced(folders, run, capsys):
    Path("other").mkdir()
    Path("other/config.yaml").touch()
    assert "--out: must not be another run" in refused(capsys, "run", "--out", "other")
    assert "--out: must not be another run" in refused(capsys, *folders, "--out", "other")
    (run / "config.yaml").touch()
    args = argparse.Namespace(run="run", out="other/../run", seed=0, coordinates=2, reward_ema=1, policy="", reward="")
    command._check(args)


def test_bad_input(folders, run, capsys, monkeypatch):
    assert "no such folder" in refused(capsys, "absent")
    assert "must be given" in refused(capsys)
    assert "must be given" in refused(capsys, "--reward", "reward")
    assert "together" in refused(capsys, "run", "--policy", "policy")
    assert "--reward-ema" in refused(capsys, *folders, "--reward-ema", "0")
    for seed in ("-1", str(2**32)):
        assert f"--seed: must lie in [0, 2^32), got {seed}" in refused(capsys, *folders, "--seed", seed)
    sides = of_folder("policy", "policy"), of_folder("reward", "reward")
    with pytest.raises(InputError, match=r"^--seed: must lie in"):
        analyse(*sides, seed=2**32)
    assert "--coordinates" in refused(capsys, *folders, "--coordinates", "1")
    assert "Did you mean 'tsne'?" in refused(capsys, *folders, "--projections", "pca,tsnee")
    assert "sft and policy" in refused(capsys, "policy")
    Path("file").touch()
    assert "--out" in refused(capsys, *folders, "--out", "file")
    wanted = "--policy: must be a folder of checkpoints, got 'file' (a file. Give its folder)."
    assert refused(capsys, "--policy", "file") == wanted
    assert "got 'file' (a file. Give its folder)." in refused(capsys, "file")
    wanted = "--out: must be a folder that can be written to, got 'file/x' (Not a directory). Choose another."
    assert refused(capsys, *folders, "--out", "file/x") == wanted
    Path("link").symlink_to("nothing/here")
    with monkeypatch.context() as patch:
        patch.setattr("zopro.analysis.analyse.analyse", lambda *sides, **options: {})
        assert "--out: must be a folder that can be written to, got 'link' (" in refused(capsys, "run", "--out", "link")
    said = refused(capsys, "--policy", "run/policy", "--reward", "./run/reward")
    assert said.startswith("--policy: must not be a run's beside its --reward") and said.endswith(f"analyse {run}")
    with monkeypatch.context() as patch:
        patch.setattr(command, "unwritable", lambda folder: "Permission denied")
        assert "got 'run' (Permission denied)" in refused(capsys, "run")
    broken = Path("policy/checkpoint-5/adapter_model.safetensors")
    broken.write_bytes(broken.read_bytes()[:-9])
    assert str(broken) in refused(capsys, *folders)


def test_what_has_no_counterpart(folders, caplog, monkeypatch):
    """Policies alone are compared with each other; of unequal folders a line says so."""
    seen = []

    def analysed(*sides, **options):
        seen.append([len(side.checkpoints) for side in sides])
        raise InputError("enough")

    monkeypatch.setattr("zopro.analysis.analyse.analyse", analysed)
    assert cli.main(["analyze", *folders[:2]]) == cli.main(["analyse", *folders]) == 2 and caplog.text == ""
    shutil.rmtree("reward/checkpoint-15")
    assert cli.main(["analyse", *folders]) == 2 and seen == [[4, 0], [4, 4], [4, 3]]
    (said,) = caplog.messages
    assert said.startswith("--reward: has 2 updates where --policy has 3 updates. The i-th is compared with the i-th")


def test_a_projection_that_is_not_installed(folders, capsys, monkeypatch):
    monkeypatch.setattr(projection, "available", lambda: ["pca"])
    assert "pip install 'opentsne>=1.0' 'umap-learn>=0.5.6'" in refused(capsys, *folders, "--projections", "umap").lower()


def test_help_says_what_to_read(capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyse", "--help"])
    out = capsys.readouterr().out
    assert "--policy" in out and "docs/interplay.md" in out
