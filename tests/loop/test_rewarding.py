"""Rewards of items: what functions are given, how several are weighed, and what becomes of those that fail."""

from __future__ import annotations

import asyncio
import math
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

import tiny_trainers
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.data import Item
from zopro.loop.rewarding import Rewards
from zopro.rewards.functions import reward_function
from zopro.tasks.base import Example
from zopro.tasks.columns import lacking

USER = [{"role": "user", "content": "2 + 2?"}]
TURNS = [{"role": "system", "content": "Be brief."}, *USER]
WORDS = ["4", "four or 4"]


def item(prompt: list[dict[str, Any]] = USER, reference: str | None = None, **columns: Any) -> Item:
    return Item("rendered", [1, 2], Example(prompt, None, reference=reference, columns=columns))


def rewards(weights: dict[str, float], timeout: float = 0.0, **functions: Any) -> Rewards:
    made = {name: functions.get(name) or reward_function(name) for name in weights}
    return Rewards(weights, made, None, lambda ids: [WORDS[row[0]] for row in ids], 8, timeout)


def test_texts_where_the_row_has_a_text_and_messages_where_it_has_messages() -> None:
    given: list[dict[str, Any]] = []

    def look(**columns: Any) -> list[float]:
        given.append(columns)
        return [0.0] * len(columns["prompts"])

    plain, listed, turns = item(prompt=USER), item(prompt=USER), item(TURNS)
    listed = Item("", [1], Example(USER, None, columns={"prompt": USER, "level": 3}))
    plain = Item(
        "", [1], Example(USER, None, reference="4", columns={"prompt": "2 + 2?", "trainer_state": 1, "answer": ""})
    )
    rewards({"look": 1.0}, look=look).score([plain, listed, turns], [[0], [1], [0]])
    (call,) = given
    assert call["prompts"] == ["2 + 2?", USER, TURNS]
    assert call["completions"] == ["4", *([{"role": "assistant", "content": text}] for text in ("four or 4", "4"))]
    assert call["completion_ids"] == [[0], [1], [0]] and call["trainer_state"] is None
    assert call["level"] == [None, 3, None] and call["answer"] == ["4", None, None]
    assert "prompt" not in call and callable(call["log_metric"])


def test_a_function_may_name_what_it_wants_and_may_be_async() -> None:
    async def later(completions: list[str], level: list[int]) -> list[float]:
        await asyncio.sleep(0)
        return [len(text) * n for text, n in zip(completions, level, strict=True)]

    made = rewards({"later": 1.0}, later=later)
    items, ids = [item(level=2), item(level=3)], [[0], [1]]
    assert made.score(items, ids).total == [2.0, 27.0]

    async def inside() -> list[float]:  # as in a notebook, whose loop is running
        return made.score(items, ids).total

    assert asyncio.run(inside()) == [2.0, 27.0]


def test_rewards_are_weighed_and_those_that_do_not_apply_are_left_out() -> None:
    some = lambda completions, **_: [None, 2.0][: len(completions)]  # noqa: E731
    mine = "python:my:some"
    made = rewards({"contains": 1.0, "length:1-1": 0.5, mine: -2.0}, **{mine: some})
    found = made.score([item(answer="4"), item(answer="four")], [[0], [1]])
    assert found.total == [1.0 + 0.5, 1.0 + 0.5 / 3 - 4.0]
    assert math.isnan(found.parts[mine][0]) and found.checked() == [1.0, 1.0]
    nothing = rewards({mine: 1.0}, **{mine: some}).score([item(), item()], [[0], [0]])
    assert math.isnan(nothing.total[0]) and nothing.total[1] == 2.0 and nothing.checked() is None


def test_a_trainer_finds_the_items_by_their_place_and_logs_each_reward() -> None:
    items, logged = [item(answer="4"), item(answer="four")], {}
    call = rewards({"exact": 1.0, "length:1-1": 1.0}).as_reward_function(items)
    arguments = {"prompts": ["rendered"] * 3, "completions": ["?"] * 3, "completion_ids": [[0], [0], [1]]}
    assert call(**arguments, item=[0, 1, 1], log_metric=logged.__setitem__) == [2.0, 1.0, pytest.approx(1 / 3)]
    assert logged == {"rewards/exact": pytest.approx(1 / 3), "rewards/length:1-1": pytest.approx(7 / 9)}


@pytest.mark.parametrize("trainer", [tiny_trainers.zopro, tiny_trainers.es])
def test_a_schedule_sees_the_trainer_s_step_and_none_in_an_evaluation(trainer: Any, tmp_path: Path) -> None:
    seen: list[Any] = []

    def scheduled(completions: list[str], trainer_state: Any) -> list[float]:
        seen.append(trainer_state and trainer_state.global_step)
        return [float(len(text)) for text in completions]

    made = Rewards({"mine": 1.0}, {"mine": scheduled}, None, lambda ids: [str(row) for row in ids], 8)
    made.score([item()], [[0]])
    items = [Item(prompt, [1], Example(USER, None)) for prompt in tiny_trainers.PROMPTS]
    trainer(tmp_path, reward_funcs=made.as_reward_function(items), max_steps=2).train()
    assert seen[0] is None and list(dict.fromkeys(seen[1:])) == [0, 1]


NO_NUMBER = "must return finite numbers of at most 1e+18, or None for no reward, got"


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda completions: [1.0], "must return one number for each of 2 completions, got 1."),
        (lambda completions: ["a", "b"], f"{NO_NUMBER} 'a' (str)"),
        (lambda completions: [math.inf, 1], f"{NO_NUMBER} inf (float)"),
        (lambda completions: [1, -1e200], f"{NO_NUMBER} -1e+200 (float)"),
        (lambda completions: None, "must return a list of 2 numbers, got NoneType."),
        (lambda completions: 1 / 0, "must return 2 numbers, but raised ZeroDivisionError: division by zero. Fix it."),
        (lambda wants_more: [1, 1], "must return 2 numbers, but raised TypeError: "),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_that_says_how_to_go_on(function: Any, line: str) -> None:
    with pytest.raises(InputError) as error:
        rewards({"mine": 1.0}, mine=function).score([item(), item()], [[0], [1]])
    assert str(error.value).startswith(f"reward function '<lambda>': {line}")
    assert str(error.value).endswith("Then continue with --resume: what is finished is kept.")


def test_each_call_sees_the_row_as_it_is_in_the_file() -> None:
    seen: list[Any] = []

    def greedy(prompts: list[Any], completions: list[Any], nums: list[list[int]], **columns: Any) -> list[float]:
        seen.extend((len(prompt), list(row)) for prompt, row in zip(prompts, nums, strict=True))
        for prompt, completion, row in zip(prompts, completions, nums, strict=True):
            prompt += completion
            row.pop()
        return [0.0] * len(prompts)

    row = item(nums=[1, 2], turns=[{"role": "user", "content": "?"}])
    for _ in range(2):
        rewards({"mine": 1.0}, mine=greedy).score([row, row], [[0], [1]])
    assert seen == [(1, [1, 2])] * 4


@pytest.mark.parametrize("kind", ["plain", "async", "async that blocks"])
def test_one_that_hangs_is_given_up(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zopro.system.guard.CANCELLED", 0.05)
    mended = threading.Event()

    def hangs(**columns: Any) -> list[float]:
        mended.wait(60)
        return [1.0]

    async def hangs_too(**columns: Any) -> list[float]:
        await asyncio.sleep(60)
        return [1.0]

    async def blocks(**columns: Any) -> list[float]:
        return hangs()

    async def good(**columns: Any) -> list[float]:
        return [2.0]

    functions = {"plain": hangs, "async": hangs_too, "async that blocks": blocks}
    with pytest.raises(InputError, match=r"raised \w*TimeoutError|raised Late"):
        rewards({"mine": 1.0}, 0.05, mine=functions[kind]).score([item()], [[0]])
    assert rewards({"mine": 1.0}, 5.0, mine=good).score([item()], [[0]]).total == [2.0], "nobody waits for it"
    mended.set()


def test_what_an_async_function_keeps_can_be_used_again() -> None:
    """A limit to an endpoint's requests at once belongs to the event loop of its first use."""
    limit = asyncio.Semaphore(1)

    async def asks(completions: list[str]) -> list[float]:
        async def one(text: str) -> float:
            async with limit:
                await asyncio.sleep(0.001)
                return float(len(text))

        return await asyncio.gather(*map(one, completions))

    made = rewards({"asks": 1.0}, 60.0, asks=asks)
    for _ in range(2):
        assert made.score([item(), item()], [[0], [1]]).total == [1.0, 9.0]


def test_one_that_must_run_in_the_main_thread_is_told_how() -> None:
    def alarmed(completions: list[str]) -> list[float]:
        signal.signal(signal.SIGALRM, signal.getsignal(signal.SIGALRM))
        return [1.0] * len(completions)

    with pytest.raises(InputError) as error:
        rewards({"mine": 1.0}, 600.0, mine=alarmed).score([item()], [[0]])
    assert "in main thread of the main interpreter. Set reward_timeout: 0, which calls it" in str(error.value)
    assert rewards({"mine": 1.0}, 0.0, mine=alarmed).score([item()], [[0]]).total == [1.0]


def test_built_in_rewards_run_in_the_main_thread_where_math_verify_has_its_time_limit() -> None:
    where: list[threading.Thread] = []

    def look(**columns: Any) -> list[float]:
        where.append(threading.current_thread())
        return [1.0]

    for builtin in (True, False):
        look.builtin = builtin  # type: ignore[attr-defined]
        rewards({"look": 1.0}, 60.0, look=look).score([item()], [[0]])
    assert [thread is threading.main_thread() for thread in where] == [True, False]
    assert reward_function("maths").builtin and not hasattr(reward_function("python:math:sqrt"), "builtin")


def test_rows_that_a_reward_cannot_score_are_known() -> None:
    row = item(answer=" ", nums=[1], target=2).example
    assert lacking(row, ["maths", "countdown"]) == "the reward maths needs answer"
    assert lacking(row, ["countdown", "length:1-2", "python:a:b", "model"]) is None
    assert lacking(item(reference="x").example, ["exact"]) is None


NEEDED = {"model": "m", "train_data": "x"}


def test_defaults_depend_on_the_task() -> None:
    chat, verifiable = (RunConfig(task=task, **NEEDED) for task in ("chat", "verifiable"))
    assert (chat.reward, chat.sft_steps, chat.max_completion_length, chat.trains_reward) == (["model"], 100, 48, True)
    assert (verifiable.reward, verifiable.sft_steps, verifiable.max_completion_length) == (["maths"], 0, 256)
    assert verifiable.warm_start == "spsa" and not verifiable.trains_reward
    assert RunConfig(task="verifiable", sft_steps=3, **NEEDED).sft_steps == 3
    assert RunConfig.from_dict(verifiable.to_dict()) == verifiable


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"reward": []}, "reward: must name at least one reward, got"),
        ({"reward": "moths"}, "reward: must be one of model,"),
        ({"reward": ["json:a", "b"]}, "reward: must be one of .*A name with a comma in it stands in a list"),
        ({"reward": ["maths", "maths"]}, "reward: must name each reward once"),
        ({"reward": ["maths"], "reward_weights": [1.0, 2.0]}, "reward_weights: must be one for each of 1 rewards"),
        ({"reward_weights": [0.0]}, r"reward_weights: must not be 0, got \[0.0\]. Leave the reward out."),
        ({"reward_timeout": -1.0}, "reward_timeout: must not be negative, got -1.0."),
        ({"eval_samples": 0}, "eval_samples: must be greater than 0, got 0."),
    ],
)  # fmt: skip
def test_bad_keys_get_one_line(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InputError, match=f"^(?:{line})"):
        RunConfig(task="verifiable", **NEEDED, **options)


def test_names_with_commas_stand_in_lists(tmp_path: Path) -> None:
    from keys import read_value
    from zopro.config.reading import load_config

    assert read_value("reward", "maths, length:1-2") == ["maths", "length:1-2"]
    assert read_value("reward", '["regex:a{1,2}", maths]') == read_value("reward", ["regex:a{1,2}", "maths"])
    assert read_value("reward_weights", "1, -0.5") == read_value("reward_weights", [1, -0.5]) == [1.0, -0.5]
    assert read_value("reward_weights", 2) == [2.0] and read_value("reward_weights", []) == []
    for value in ("[", [["a"]], {"a": 1}):
        with pytest.raises(InputError, match=r"^reward: must be a list of names, comma separated"):
            read_value("reward", value)
    (tmp_path / "c.yaml").write_text("model: m\ntask: verifiable\ntrain_data: x\nreward: ['json:a,b', 'regex:^ a']\n")
    assert load_config(tmp_path / "c.yaml").reward == ["json:a,b", "regex:^ a"]
