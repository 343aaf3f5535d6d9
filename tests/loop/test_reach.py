"""A learning rate that leaves a policy as it is is named after its first steps, with one that does not."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest

from zopro.loop.reach import ENOUGH, ReachCallback


def told(*step_kls: float | None, value: float = 1e-4, steps: int = 60, follows: bool = False) -> list[str]:
    lines: list[str] = []
    callback: Any = ReachCallback(lines.append, "policy 0", "learning_rate", value, follows)
    for kl in step_kls:
        logs = {"loss": 1.0} if kl is None else {"loss": 1.0, "step_kl": kl}
        callback.on_log(None, SimpleNamespace(max_steps=steps), None, logs)
    return lines


def test_it_is_said_once_after_a_few_steps_and_the_rate_it_names_would_do() -> None:
    assert told(*[4e-6] * (ENOUGH - 1)) == told(None, None, None) == []
    (line,) = told(None, 2e-6, 4e-6, 6e-6, *[1e-9] * 20)
    assert line == (
        "policy 0: 60 steps at learning_rate: 0.0001 make a KL of about 0.0002 nats an answer, too little to change one. "
        "At 0.006 they make about 1."
    )
    rate = float(re.findall(r"At (\S+) they", line)[0])
    assert 60 * 4e-6 * (rate / 1e-4) ** 2 == pytest.approx(1, rel=0.2)
    assert told(*[4e-6 * (rate / 1e-4) ** 2] * 3, value=rate) == []


def test_steps_along_one_update_add_up() -> None:
    assert told(*[1e-4] * 3) and not told(*[1e-4] * 3, follows=True)
    (line,) = told(*[1e-6] * 3, follows=True)
    assert "0.004 nats" in line


@pytest.mark.parametrize("kl", [0.0, float("nan"), 1.0])
def test_steps_that_say_nothing_or_enough_are_not_told_of(kl: float) -> None:
    assert told(*[kl] * 5) == []
