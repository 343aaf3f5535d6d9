"""`RunHandle.generate`: what it takes for prompts, and what it says of an argument that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import zopro
from tiny_finished import finished_run
from zopro.errors import InputError

QUESTION = "what is a good day"
TALK = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return zopro.load(finished_run(Path(tmp_path_factory.mktemp("finished"))))


def test_one_conversation_is_one_prompt(run: Any) -> None:
    said = run.generate(QUESTION)
    assert len(said) == 1 and said == run.generate(TALK) == run.generate([TALK]) == run.generate((QUESTION,))
    longer = [*TALK, {"role": "assistant", "content": "a red day"}, {"role": "user", "content": "what is red"}]
    assert run.generate(longer) == run.generate([longer]) and len(run.generate([longer, QUESTION])) == 2
    assert len(run.generate(text for text in (QUESTION, "red"))) == 2


@pytest.mark.parametrize("prompts", [None, 3, [None], [TALK[0], QUESTION], [["what"]], [[{"content": "what"}]]])
def test_what_is_no_prompt_is_one_line(prompts: Any, run: Any) -> None:
    with pytest.raises(
        InputError, match=r"^prompts: must be texts, or lists of messages with role and content, got .*\.$"
    ):
        run.generate(prompts)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("max_new_tokens", 1.5, "a whole number"),
        ("max_new_tokens", True, "a whole number"),
        ("max_new_tokens", 0, "at least 1"),
        ("temperature", "1", "a number"),
        ("temperature", float("nan"), "0 or lie in"),
        ("seed", None, "a whole number"),
        ("seed", 1.0, "a whole number"),
    ],
)
def test_a_number_that_is_none_is_one_line_by_the_argument_s_name(name: str, value: Any, rule: str, run: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name}: must be {rule}.*, got {value!r}\."):
        run.generate(QUESTION, **{name: value})


def test_a_run_that_is_resumed_has_a_name() -> None:
    with pytest.raises(InputError, match=r"^output_dir: must be given to resume a run, got none\."):
        zopro.run({"model": "m", "task": "chat", "train_data": "rows.jsonl"}, resume=True)


def test_what_contradicts_itself_is_refused_before_anything_is_loaded(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zopro.loop.pipeline.run", lambda *given, **options: pytest.fail("it began"))
    with pytest.raises(InputError, match=r"^queries: must be 1 with guide: spsa"):
        zopro.run(run.config, method="guided", guide="spsa", queries=2, output_dir=tmp_path / "run")
    with pytest.raises(InputError, match=r"^queries: must be 1 with guide: spsa"):
        zopro.run(run.config, method="zopro", warm_start="guided", guide="spsa", queries=2, output_dir=tmp_path / "run")


def test_the_command_s_flags_are_arguments_here(run: Any) -> None:
    for options, said in (
        ({"temperature": -1}, "^temperature: must not be negative, got -1"),
        ({"seed": -1}, "^seed: must not be negative"),
        ({"max_new_tokens": 100000}, "Shorten the conversation or max_new_tokens"),
    ):
        with pytest.raises(InputError, match=said) as error:
            run.generate(QUESTION, **options)
        assert "--" not in str(error.value)
    with pytest.raises(InputError, match=r"^iteration: must be one of .*, got 9"):
        zopro.load(run.path, 9)
