"""What users' reward functions may do wrong: each named in one line, none waited for for ever."""

from __future__ import annotations

import asyncio
import functools
import math
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch

import tiny_trainers
from zopro.errors import InputError
from zopro.system import guard
from zopro.train.rloo import EngineRLOOTrainer

CALL = {"prompts": ["p", "q"], "completions": ["a", "b"], "completion_ids": [[1], [2]]}


@pytest.mark.parametrize(
    "answer",
    [[1, 0.5], (True, 0.5), numpy.array([1.0, 0.5]), torch.tensor([1.0, 0.5]), iter([1.0, 0.5])],
    ids=["list", "tuple", "array", "tensor", "iterator"],
)
def test_numbers_of_every_kind_are_rewards(answer):
    assert guard.checked_reward(lambda **_: answer)(**CALL) == [1.0, 0.5]


def test_none_is_trls_word_for_no_reward():
    first, second = guard.checked_reward(lambda **_: [None, 2])(**CALL)
    assert math.isnan(first) and second == 2.0


def _ends() -> None:
    raise SystemExit


async def _later() -> list[float]:
    return [1.0, 1.0]


class Unreadable:
    def __float__(self) -> float:
        raise RuntimeError("no number")


BAD = {
    "raises late": (lambda **_: (1 / 0 for _ in "ab"), "but raised ZeroDivisionError: division by zero. Fix it."),
    "raises as if it were no list": (lambda **_: (len(one) for one in [1, 2]), "has no len(). Fix it."),
    "ends the process": (lambda **_: _ends(), "but raised RuntimeError: it called sys.exit(None). Fix it."),
    "a mapping": (lambda **_: {0: 1.0, 1: 2.0}, "must return a list of 2 numbers, got dict."),
    "a set": (lambda **_: {1.0, 2.0}, "must return a list of 2 numbers, got set."),
    "a text of two letters": (lambda **_: "12", "must return a list of 2 numbers, got str."),
    "a number of an array": (lambda **_: numpy.array(1.0), "must return a list of 2 numbers, got float."),
    "no conversion": (lambda **_: [Unreadable(), 1.0], "(Unreadable) for completion 0."),
    "raises": (lambda **_: 1 / 0, "must return 2 numbers, but raised ZeroDivisionError: division by zero. Fix it."),
    "other columns": (
        lambda completions: [1.0, 1.0],
        "<lambda>() got an unexpected keyword argument 'prompts'. Let it take **columns too.",
    ),
    "nothing": (lambda **_: None, "must return a list of 2 numbers, got NoneType."),
    "one number": (lambda **_: 1.0, "must return a list of 2 numbers, got float."),
    "too few": (lambda **_: [1.0], "must return one number for each of 2 completions, got 1."),
    "too many": (lambda **_: [1.0] * 3, "must return one number for each of 2 completions, got 3."),
    "nan": (lambda **_: [1.0, math.nan], "got nan (float) for completion 1."),
    "infinite": (lambda **_: torch.tensor([math.inf, 0.0]), "got tensor(inf) (Tensor) for completion 0."),
    "text": (lambda **_: [1.0, "2.0"], "got '2.0' (str) for completion 1."),
    "a list": (lambda **_: [[1.0], [2.0]], "got [1.0] (list) for completion 0."),
    "too large": (lambda **_: [10**400, 0], "(int) for completion 0."),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_reward_is_named(case):
    function, message = BAD[case]
    function = functools.wraps(lambda: None)(function)
    function.__name__ = "taste"
    with pytest.raises(InputError) as error:
        guard.checked_reward(function)(**CALL)
    text = str(error.value)
    assert text.startswith("reward function 'taste': must return") and text.endswith(message) and "\n" not in text


def test_a_coroutine_is_closed_so_that_python_does_not_warn_of_it():
    made = _later()
    with pytest.raises(InputError, match=r"must return a list of 2 numbers, got coroutine\."):
        guard.checked_reward(lambda **_: made)(**CALL)
    assert made.cr_frame is None


def test_a_call_that_hangs_is_left_behind():
    release = threading.Event()

    def hangs(**kwargs):
        release.wait()
        return [0.0, 0.0]

    began = time.perf_counter()
    with pytest.raises(InputError, match=r"'hangs': .* no answer within 0.1 seconds. Fix it, or raise reward_timeout"):
        guard.checked_reward(hangs, timeout=0.1)(**CALL)
    assert time.perf_counter() - began < 5
    release.set()


def test_a_generator_works_in_the_time_of_its_call():
    release = threading.Event()

    def hangs(**kwargs):
        yield 1.0
        release.wait()
        yield 2.0

    with pytest.raises(InputError, match="raise reward_timeout"):
        guard.checked_reward(hangs, timeout=0.1)(**CALL)
    release.set()


def test_async_functions_stay_async_and_are_cancelled():
    cancelled = []

    async def hangs(**kwargs):
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def good(**kwargs):
        return [1, 2]

    assert asyncio.run(guard.checked_reward(good)(**CALL)) == [1.0, 2.0]
    with pytest.raises(InputError, match="raise reward_timeout"):
        asyncio.run(guard.checked_reward(functools.partial(hangs), timeout=0.05)(**CALL))
    assert cancelled == [True]


def test_a_timed_call_is_the_same_call():
    with torch.no_grad():
        seen = guard.call(lambda: (torch.is_grad_enabled(), torch.get_num_threads()), 5.0)
    assert seen == (False, torch.get_num_threads())
    with pytest.raises(KeyError, match="gone"):
        guard.call(lambda: {}["gone"], 5.0)


def test_trainers_refuse_what_is_no_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_trainers, "tea", lambda completions, **kwargs: [0.0] * (len(completions) - 1))
    trainer = tiny_trainers.zopro(tmp_path, max_steps=1)
    assert isinstance(trainer, EngineRLOOTrainer) and trainer.reward_func_names == ["<lambda>"]
    with pytest.raises(InputError, match="must return one number for each of 32 completions, got 31"):
        trainer.train()


def test_trainers_do_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(tiny_trainers, "tea", lambda completions, **kwargs: release.wait())
    trainer = tiny_trainers.zopro(tmp_path, max_steps=1, reward_timeout=0.1)
    with pytest.raises(InputError, match="raise reward_timeout"):
        trainer.train()
    release.set()
