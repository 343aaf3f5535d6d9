"""Answers that are too long to learn from are refused when the data are opened: before a model, and in a dry run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tiny_runs import config, rows
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import estimate, learned, opening
from zopro.loop.data import Item
from zopro.loop.learned import check_answers
from zopro.tasks import Example

LONG = "tea or cake, please, and tea or milk, please, and plum"
PAIR = r"train_data: must have a chosen and a rejected answer that end within max_completion_length=8 tokens, got none"
SFT = "max_completion_length: no chosen answer ends within 8 tokens"


def settings(folder: Path, out: Path, **long: str) -> RunConfig:
    data = out / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, **{key: f"{row[key]} {text}" for key, text in long.items()}}) + "\n"
                            for row in rows()))  # fmt: skip
    return config(folder, out / "run", train_data=str(data))


@pytest.mark.parametrize(("long", "line"), [({"rejected": LONG}, PAIR), ({"chosen": LONG}, SFT)])
def test_a_dry_run_refuses_before_the_model(
    long: dict[str, str], line: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zopro.loop.models.load_start", lambda *given: pytest.fail("the model was loaded first"))
    with pytest.raises(InputError, match=line):
        estimate.dry_run(settings(folder, tmp_path, **long))


def test_the_model_s_own_ending_counts_and_nothing_is_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is known when it is loaded; before that, the shortest there can be is counted."""
    monkeypatch.setattr(opening, "check_answers_early", lambda *given: None)
    with pytest.raises(InputError, match=PAIR):
        opening.open_all(settings(folder, tmp_path, rejected=LONG))
    assert not (tmp_path / "run").exists()


def scored(*given: tuple[str, float]) -> Any:
    train = [Item("", [], Example(prompt=(), chosen=text, score=score)) for text, score in given]
    return SimpleNamespace(regressed=True, train=train)


def test_scores_are_those_of_answers_that_fit() -> None:
    frame: Any = SimpleNamespace(length=len)
    asked: Any = SimpleNamespace(max_completion_length=8, sft_steps=0, trains_reward=True)
    check_answers(asked, scored(("tea", 1.0), ("milk", 2.0)), frame)
    for few in ([("tea", 1.0), ("milk", 1.0)], [("tea", 1.0), ("much too long", 2.0)], [("much too long", 2.0)]):
        with pytest.raises(InputError, match="must have two different scores that end within"):
            check_answers(asked, scored(*few), frame)


@pytest.mark.parametrize("regressed", [False, True])
def test_held_out_rows_that_are_not_measured_are_counted(regressed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(learned, "say", said.append)
    rows = [Item("", [], Example((), chosen="a", rejected="b", score=score)) for score in (1.0, 2.0, 3.0)]
    data: Any = SimpleNamespace(regressed=regressed, eval=rows)
    for n in (3, 2):
        measure = {"correlation" if regressed else "accuracy": lambda rows, size, n=n: {"n": n}}
        assert learned.held_out_quality(SimpleNamespace(**measure), data, 4) == {"n": n}  # type: ignore[arg-type]
    (line,) = said
    assert line.startswith("reward model: 1 of 3 held-out rows have an answer that does not fit")
