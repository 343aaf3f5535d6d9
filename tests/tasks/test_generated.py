"""Problems made on the spot: solvable, different, the same for a seed, and never in both splits."""

from __future__ import annotations

import re

import pytest

from zopro.errors import InputError
from zopro.rewards.functions import reward_function
from zopro.tasks.generated import KINDS, arithmetic, countdown


@pytest.mark.parametrize("numbers", [2, 3, 4, 6])
def test_every_countdown_is_solved_by_its_solution(numbers: int) -> None:
    rows = countdown(100, numbers=numbers)
    solutions = [row["solution"] for row in rows]
    columns = {name: [row[name] for row in rows] for name in ("nums", "target")}
    assert reward_function("countdown")(prompts=solutions, completions=solutions, **columns) == [1.0] * 100
    for row in rows:
        text, _, end = row["solution"].partition(" = ")
        assert sorted(map(int, re.findall(r"\d+", text))) == sorted(row["nums"]) and len(row["nums"]) == numbers
        assert abs(eval(text) - row["target"]) < 1e-9 and int(end) == row["target"] and 10 <= row["target"] <= 100
        assert all(str(number) in row["prompt"] for number in (*row["nums"], row["target"]))


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_every_answer_of_arithmetic_is_right(difficulty: int) -> None:
    rows = arithmetic(300, difficulties=[difficulty])
    for row in rows:
        said = row["prompt"].removeprefix("What is ").removesuffix("?")
        assert str(eval(said)) == row["answer"] and row["difficulty"] == difficulty
        terms = [len(number) for number in re.findall(r"\d+", said)]
        assert sorted(terms) == {1: [2, 2], 2: [1, 2], 3: [2, 2], 4: [2, 2, 2]}[difficulty]
    assert difficulty != 1 or {row["prompt"].split()[3] for row in rows} == {"+", "-"}


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_differ_repeat_with_the_seed_and_keep_out_of_the_other_split(kind: str) -> None:
    def problems(split: str, seed: int) -> set[str]:
        rows = KINDS[kind](400, split, seed)
        keys = {
            repr(sorted(row["nums"]) if kind == "countdown" else sorted(row["prompt"])) + str(row.get("target"))
            for row in rows
        }
        assert len({row["prompt"] for row in rows}) == 400
        return keys if kind == "countdown" else {" ".join(sorted(row["prompt"].split())) for row in rows}

    assert KINDS[kind](50, "test", 3) == KINDS[kind](50, "test", 3) != KINDS[kind](50, "test", 4)
    assert KINDS[kind](10, "train", 3) == KINDS[kind](50, "train", 3)[:10]
    held_out = problems("test", 0) | problems("test", 1)
    assert not held_out & (problems("train", 0) | problems("train", 2))


def test_more_rows_than_there_are_problems_are_refused_with_their_number() -> None:
    with pytest.raises(InputError, match=r"^--rows: must be at most about \d+, the different test problems") as error:
        arithmetic(5000, "test", difficulties=[2])
    most = int(re.findall(r"\d+", str(error.value))[0])
    assert len(arithmetic(most, "test", difficulties=[2])) == most < 720
