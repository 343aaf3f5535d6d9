"""Run directories that somebody has damaged: each command names the file in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from commands import refused, typed
from one_run import no_report
from tiny_runs import config
from zopro.loop import pipeline

pytestmark = pytest.mark.usefixtures("quietly")


@pytest.fixture(scope="module")
def finished(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, and what a stop in its SFT would have left of the trainer."""
    folder = tmp_path_factory.mktemp("finished")
    small = {"reward_steps": 1, "pair_prompts": 2, "eval_prompts": 2, "policy_steps": 1, "iterations": 1}
    settings = config(inputs, folder / "run", **small, warm_start="spsa", checkpoint_steps=1)
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        patch.setattr(pipeline, "clear", lambda folder: None)
        pipeline.run(settings, quiet=True)
    return folder / "run"


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def resume(capsys: pytest.CaptureFixture[str], copy: Path) -> str:
    return refused(capsys, "run", copy / "config.yaml", "--resume", "--output_dir", copy)


NOISE = (b"", b"\x00\xff{", b"[1]\n")


RESUMED = ["environment.json", "metrics.jsonl", "evaluations/sft.json", "evaluations/sft.jsonl"]


@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_record_is_named_when_a_run_is_resumed(name, copy, capsys):
    (copy / "summary.json").unlink()  # stopped on the way to it
    for noise in NOISE[1:]:
        (copy / name).write_bytes(noise + b"\n")
        assert str(copy / name) in resume(capsys, copy)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("environment.json", '{"threads": "x"}', "must hold the number of threads, got 'x'"),
        ("metrics.jsonl", '{"iteration": null, "step": 1}\n', "line 1 must say of which stage"),
        (
            "metrics.jsonl",
            '{"stage": "sft", "iteration": null, "step": null, "event": "end"}\n',
            "at a stage's end seconds",
        ),
    ],
)
def test_a_record_that_says_something_else(name, text, said, copy, capsys):
    (copy / "summary.json").unlink()
    (copy / name).write_text(text)
    line = resume(capsys, copy)
    assert str(copy / name) in line and said in line


def test_a_line_of_a_finished_run_s_record_and_its_summary(copy, capsys):
    (copy / "summary.json").write_text("{")
    line = resume(capsys, copy)
    assert "must be there and be JSON" in line and line.endswith("Or delete it: --resume then writes it anew.")
    lines = (copy / "metrics.jsonl").read_bytes().split(b"\n")
    (copy / "metrics.jsonl").write_bytes(b"\n".join([*lines[:2], b"{bad", *lines[3:]]))
    (copy / "summary.json").unlink()
    assert "double quotes in line 3. Restore it." in resume(capsys, copy)


def test_a_configuration_that_lacks_what_a_run_needs_is_named(copy, capsys):
    (copy / "config.yaml").write_text("task: chat\n")
    line = refused(capsys, "export", copy, "--out", copy.parent / "out")
    assert line.startswith(f"'{copy}/config.yaml': must be the run's configuration, but model: must be set")


def test_a_record_that_is_gone(copy, capsys):
    (copy / "environment.json").unlink()
    assert "environment.json': must be there" in resume(capsys, copy)


def test_a_damaged_checkpoint_is_named(copy, capsys):
    """Each of its files: tests/train/test_construction.py."""
    for output in ("sft", "reward", "policy", "evaluations", "iterations"):
        shutil.rmtree(copy / output)
    file = copy / "trainer" / "sft" / "checkpoint-1" / "optimizer.pt"
    assert file.is_file()
    file.write_bytes(NOISE[1])
    assert str(file.parent) in resume(capsys, copy)


def test_a_run_of_another_version(copy, capsys):
    settings = yaml.safe_load((copy / "config.yaml").read_text())
    lacking = {key: value for key, value in settings.items() if key != "advantage"}
    (copy / "config.yaml").write_text(yaml.safe_dump(lacking))
    assert typed(capsys, "run", copy / "config.yaml", "--resume", "--output_dir", copy)[0] == 0, "an earlier one's"
    (copy / "config.yaml").write_text(yaml.safe_dump(settings | {"later_key": 1}))
    assert resume(capsys, copy) == "later_key: no such configuration key."
    (copy / "config.yaml").write_bytes(b"a: [")
    assert "valid YAML" in resume(capsys, copy)


READERS = {
    "generate": ("--prompt", "tea", "--max-new-tokens", "1"),
    "export": ("--out", "OUT"),
    "replay": ("--out", "OUT"),
    "analyse": ("--out", "OUT", "--projections", "pca"),
}


PLACES = ("absent", "file", "model", "run/policy", "run/sft", "x" * 300)


@pytest.mark.parametrize("command", READERS)
def test_a_folder_that_is_no_run(command, copy, inputs, tmp_path, capsys):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[command]]
    (tmp_path / "file").touch()
    (tmp_path / "model").symlink_to(inputs / "model")
    for place in PLACES:
        assert place in refused(capsys, command, tmp_path / place, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", READERS)
def test_a_run_whose_files_are_noise(command, copy, tmp_path, capsys):
    words = [str(tmp_path / "out") if word == "OUT" else word for word in READERS[command]]
    damaged = {
        "generate": ("policy/000/adapter_model.safetensors", "policy/000/adapter_config.json", "config.yaml"),
        "export": ("policy/000/adapter_model.safetensors", "policy/000/adapter_config.json", "config.yaml"),
        "replay": ("iterations/000/journal.jsonl", "sft/adapter_model.safetensors", "config.yaml"),
        "analyse": ("policy/000/adapter_model.safetensors", "policy/000/adapter_config.json"),
    }
    for name in damaged[command]:
        whole = (copy / name).read_bytes()
        for noise in NOISE:
            (copy / name).write_bytes(noise)
            refused(capsys, command, copy, *words)
            assert not (tmp_path / "out").exists()
        (copy / name).write_bytes(whole)


def test_a_result_that_can_be_written_nowhere(copy, tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in ("export", "replay"):
        for place in ("file", "file/out", "long" * 100):
            assert place in refused(capsys, command, copy, "--out", tmp_path / place)


@pytest.mark.parametrize("command", ["export", "replay"])
def test_a_result_in_the_place_of_an_empty_folder(command, copy, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    for here in (".", tmp_path / "link"):
        assert refused(capsys, command, copy, "--out", here).endswith("in which the command runs. Choose one in it.")
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: True)
        assert "where a disk is mounted" in refused(capsys, command, copy, "--out", tmp_path / "link")
    assert typed(capsys, command, copy, "--out", tmp_path / "link")[0] == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty/adapter_model.safetensors").is_file()
    assert not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize(
    "words", [["--temperature", "1e-300"], ["--temperature", "nan"], ["--seed", 2**70], ["--seed", -1]]
)
def test_numbers_that_cannot_be_sampled_with(words, copy, capsys):
    line = refused(capsys, "generate", copy, "--prompt", "tea", *words)
    assert words[0].removeprefix("--") in line and "must" in line
