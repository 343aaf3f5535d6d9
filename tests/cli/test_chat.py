"""`zopro chat`: both sides answer as transformers does, each with its own history."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any, TextIO

import pytest
from transformers import AutoModelForCausalLM

from tiny_finished import finished_run, greedy, policy
from zopro import cli


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("work"))


@pytest.fixture
def chat(run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Says lines to the command and returns its exit code, stdout and stderr."""
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)

    def say(text: str | TextIO | None, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text) if isinstance(text, str) else text)
        return cli.main(["chat", str(run), *words]), *capsys.readouterr()

    return say


def test_each_side_goes_on_from_what_it_has_said_itself(run: Path, chat: Any) -> None:
    code, out, _ = chat("red\n\ntall\n/reset\ntall\n/quit\nnever read\n", "--temperature", "0", "--json")
    turns = json.loads(out)["turns"]
    assert code == 0 and [turn["prompt"] for turn in turns] == ["red", "tall", "tall"]
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base")
    for name, model in (("base", base), ("aligned", policy(run, "policy/001"))):
        first, second, fresh = (turn[name] for turn in turns)
        assert first == greedy(run, model, "red")
        assert second == greedy(run, model, "red", first, "tall")
        assert fresh == greedy(run, model, "tall")
    assert turns[1]["base"] != turns[1]["aligned"] != turns[2]["aligned"]


def test_lines_for_a_pipe(chat: Any) -> None:
    code, out, err = chat("red\n", "--iteration", "0", "--max-new-tokens", "3")
    assert code == 0 and [line.partition(" ")[0] for line in out.splitlines()] == [">", "base:", "aligned", ""]
    assert "(iteration 0): " in out and "/reset" in err


def test_sampling_is_the_run_s_own_and_repeats_with_its_seed(chat: Any) -> None:
    as_run, again, other = (
        chat("red\n", "--json", "--seed", seed, *words)[1]
        for seed, words in (("0", ()), ("0", ("--temperature", "1.0", "--max-new-tokens", "6")), ("9", ()))
    )
    assert as_run == again != other


def test_what_cannot_be_answered_is_one_line_and_forgotten(chat: Any) -> None:
    code, out, err = chat(f"{'red ' * 70}\n/help\nred\n", "--json", "--temperature", "0")
    assert code == 0 and [turn["prompt"] for turn in json.loads(out)["turns"]] == ["red"]
    assert "must with its answer fit the model's context of 64 tokens" in err and "/help: no such command" in err


def test_a_path_is_a_message_and_a_mark_before_a_command_is_none(chat: Any) -> None:
    code, out, _ = chat("\ufeff/quit\nnever read\n", "--json")
    assert code == 0 and json.loads(out)["turns"] == []
    code, out, err = chat("/etc/fstab: what is it?\nred\n", "--json", "--seed", str(2**63 - 1), "--max-new-tokens", "1")
    assert code == 0 and [turn["prompt"] for turn in json.loads(out)["turns"]] == ["/etc/fstab: what is it?", "red"]
    assert "2^63" not in err, "the second message has a seed too"


def test_bad_input_is_refused(chat: Any) -> None:
    assert chat("red\n", "--iteration", "7")[0] == 2
    code, _, err = chat("red\n", "--temperature", "-1")
    assert code == 2 and "--temperature: must not be negative" in err


@pytest.mark.parametrize("strict", [True, False])
def test_bytes_that_are_not_utf_8_are_one_message_that_is_refused(strict: bool, chat: Any) -> None:
    """As a locale has Python read them, strictly or with half characters in their place."""
    lines = io.TextIOWrapper(io.BytesIO(b"red\ncaf\xe9\ntall\n"), "utf-8", "strict" if strict else "surrogateescape")
    code, out, err = chat(lines, "--json", "--max-new-tokens", "1")
    assert code == 0 and [turn["prompt"] for turn in json.loads(out)["turns"]] == ["red", "tall"]
    assert "prompt: must be text in UTF-8, got '\\udce9' in it" in err


class Typed(io.StringIO):
    """What a person types at a terminal."""

    def isatty(self) -> bool:
        return True


def test_where_stdout_is_no_terminal_a_person_is_asked_on_stderr(chat: Any) -> None:
    code, out, err = chat(Typed("red\n"), "--json", "--max-new-tokens", "1")
    assert code == 0 and [turn["prompt"] for turn in json.loads(out)["turns"]] == ["red"]
    assert err.count("> ") == 2
    assert "> > " not in chat(Typed("red\n"), "--max-new-tokens", "1")[1]


def test_no_stdin_has_no_messages(chat: Any) -> None:
    code, out, _ = chat(None, "--json")
    assert code == 0 and json.loads(out)["turns"] == []
