"""What a population logs of a step: TRL's columns, of the answers that have a reward."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from trl.trainer.utils import nanstd

from tiny_trainers import es, lines, zopro
from zopro.train.population import Scored, flat, joined, numbers

OF_LOG_PROBS = ("clip_ratio/", "entropy", "eps", "projected_gradient", "step_kl")


pytestmark = pytest.mark.usefixtures("random_state")


def test_a_step_logs_what_trl_s_trainers_do(tmp_path: Path) -> None:
    theirs = zopro(tmp_path, max_steps=1, eps=1e-3)
    ours = es(tmp_path, max_steps=2, population=4)
    for trainer in (theirs, ours):
        trainer.train()
    line = lines(ours)[-1]
    assert {name for name in lines(theirs)[0] if not name.startswith(OF_LOG_PROBS)} <= line.keys()
    words = sum(16 * (1 + each["completions/mean_length"]) for each in lines(ours))  # of prompts of one word
    assert line["num_tokens"] == ours.state.num_input_tokens_seen == pytest.approx(words)


def member(rewards: list[float], lengths: list[float], ended: list[float]) -> Scored:
    return Scored(rewards, lengths, ended, [rewards, [math.nan] * len(rewards)], 7.0)


def test_answers_without_a_reward_are_left_out() -> None:
    nan = math.nan
    members = [member([nan, nan], [3, 4], [0, 0]), member([1, 3], [5, 2], [1, 0]), member([5, 3], [6, 9], [1, 1])]
    for order in (members, members[::-1]):
        found = numbers(order, ["told", "never"])
        assert (found["reward"], found["reward_best"], found["reward_spread"]) == (3.0, 4.0, 1.0)
        assert found["reward_std"] == pytest.approx(float(nanstd(torch.tensor([1.0, 3.0, 5.0, 3.0]))))
        assert found["frac_reward_zero_std"] == 0.5, "the second prompt tells no member from another"
        assert found["rewards/told/mean"] == 3.0 and math.isnan(found["rewards/never/mean"])
    assert [found[f"completions/{name}_length"] for name in ("min", "max", "mean_terminated", "min_terminated")] == [
        *(2, 9),
        *(pytest.approx(20 / 3), 5),
    ]
    none = numbers(members[:1], ["told", "never"])
    assert math.isnan(none["reward"]) and none["completions/max_terminated_length"] == 0


def test_ranks_put_a_member_together() -> None:
    parts = [member([1, 3], [5, 2], [1, 0]), member([5, 3], [6, 9], [1, 1])]
    whole = joined([*flat(parts[0]), *flat(parts[1])], 2, 2)
    assert whole[:3] == ([1, 3, 5, 3], [5, 2, 6, 9], [1, 0, 1, 1])
    assert whole.by_function[0] == whole.rewards and len(whole.by_function[1]) == 4 and whole.prompt_tokens == 14
