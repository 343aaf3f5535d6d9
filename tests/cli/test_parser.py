"""What is typed is read as it is meant: paths begin at home, flags take no file, and what is wrong is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from commands import refused
from zopro import cli
from zopro.cli.parser import Parser
from zopro.config import RunConfig


@pytest.fixture(autouse=True)
def in_a_folder_with_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    Path("config.yaml").write_text("model: m/m\ntask: chat\ntrain_data: rows.jsonl\n")
    Path("rows.jsonl").touch()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that reach the pipeline."""
    seen: list[RunConfig] = []
    monkeypatch.setattr("zopro.loop.pipeline.run", lambda config, **options: seen.append(config) or {})
    return seen


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["run", "config.yaml", "--vllm_flags", "--enforce-eager"], "--vllm_flags"),
        (["run", "config.yaml", "--beta", "-1e-3"], "--beta"),
        (["generate", "RUN", "--prompt", "-5?"], "--prompt"),
    ],
)
def test_how_to_give_a_value_that_looks_like_an_option(
    words: list[str], option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, *words)
    assert line.startswith(f"argument {option}: expected ")
    assert line.endswith(f" A value that begins with - is given as {option}=VALUE.")


@pytest.mark.parametrize("more", [[], ["--seed", "3"]])
def test_a_value_that_is_missing_does_not_begin_with_a_dash(more: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "VALUE" not in refused(capsys, "data", "arithmetic", "--rows", "4", "--out", "x", "--difficulty", *more)


def test_a_text_that_looks_like_an_option_stays_a_text() -> None:
    parser = Parser(prog="zopro")
    parser.add_argument("--prompt")
    parser.add_argument("--max-new-tokens")
    text = "--max_new_tokens=5 is what?"
    assert [*parser._looked_through(["--prompt", text, "--max_new_tokens=5"])] == ["--prompt", text, "--max-new-tokens=5"]


def test_what_stands_after_an_option_of_many_values_is_said_to_come_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "generate", "--prompt", "tea", "RUN")
    assert line.endswith(" Give RUN before --prompt, which takes every word after it.")
    assert "Give RUN" not in refused(capsys, "generate")


def test_a_boolean_key_takes_a_truth_value_alone(made: list[RunConfig]) -> None:
    assert cli.main(["run", "--eval_greedy", "config.yaml", "--easy_questions", "7", "--lora-freeze-a", "No"]) == 0
    assert (made[0].eval_greedy, made[0].easy_questions, made[0].lora_freeze_a) == (True, 7, False)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("run X --dry_run --lora-r=4 --eval-greedy", "run X --dry-run --lora_r 4 --eval_greedy true"),
        ("bench step --num_generations 4", "bench step --num-generations 4"),
        ("demo --output-dir D", "demo --out D"),
        ("generate R --max_new_tokens=3 --prompt a_b", "generate R --max-new-tokens 3 --prompt a_b"),
    ],
)
def test_hyphens_and_underscores_in_a_name_are_the_same(typed: str, meant: str) -> None:
    assert cli._parser().parse_args(typed.split()) == cli._parser().parse_args(meant.split())


def test_every_command_says_what_it_does() -> None:
    commands = next(action.choices for action in cli._parser()._actions if isinstance(action.choices, dict))
    assert [name for name, command in commands.items() if not command.description] == []


PATHS = {"RUN": ["generate", "X", "--prompt", "x"], "CONFIG": ["run", "X"]} | {
    name: [*words.split(), "X"]
    for name, words in {
        "--out": "data arithmetic --rows 2 --out",
        "--out of export": "export RUN --out",
        "--out of compare": "compare config.yaml --methods es --steps 1 --out",
        "--policy": "analyse --reward R --policy",
        "--model": "init chat --model",
        "--data": "init chat --data",
    }.items()
}


@pytest.mark.parametrize("argument", PATHS)
def test_what_no_path_can_be(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    for given, words in (
        ("", "must be a path, got ''"),
        ("e\udcff", "must be a path in UTF-8 without control characters"),
    ):
        line = refused(capsys, *(given if word == "X" else word for word in PATHS[argument]))
        assert line.startswith(f"argument {argument.split()[0]}: {words}")


def test_a_path_begins_at_home(
    made: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cli.main(["data", "arithmetic", "--rows", "2", "--out=~/new.jsonl"]) == 0
    assert (tmp_path / "home/new.jsonl").exists() and not Path("~").exists()
    Path("config.yaml").rename(tmp_path / "home/config.yaml")
    assert cli.main(["run", "~/config.yaml"]) == 0 and len(made) == 1
    assert f"got '{tmp_path}/home/R'" in refused(capsys, "generate", "~/R", "--prompt", "x")
