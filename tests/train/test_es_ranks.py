"""Evolution strategies on many ranks: they share prompts or members, and end at one rank's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from many_ranks import results, train
from tiny_trainers import counting, es, with_adapter
from zopro.system.launch import Processes, alone


def on_prompts(greedy: bool) -> dict[str, Any]:
    return found(
        train(es, 4, {"model": with_adapter(), "max_steps": 3, "population": 4, "sigma": "auto", "greedy": greedy})
    )


def on_members(kept: Path) -> dict[str, Any]:
    Processes.join("cpu", 1)
    asked: list[str] = []
    with alone():
        options = {"max_steps": 2, "population": 6, "parallel": "queries", "kept": kept, "reward_funcs": counting(asked)}
        result = train(es, 4, {"model": with_adapter(), **options})
    return {**found(result), "asked": len(asked)}


def found(result: dict[str, Any]) -> dict[str, Any]:
    keys = ("reward", "reward_best", "reward_spread", "ended", "completions/mean_length", "rewards/tea/mean", "sigma")
    return {**result, "log": [{key: line.get(key) for key in keys} for line in result["log"]]}


@pytest.mark.parametrize("greedy", [False, True])
def test_ranks_share_prompts(greedy: bool) -> None:
    one, two = results(on_prompts, 1, greedy)[0], results(on_prompts, 2, greedy)
    for rank in two:
        assert rank["gradients"] == one["gradients"] and rank["bits"] == one["bits"]
        for ours, theirs in zip(rank["log"], one["log"], strict=True):
            assert ours == pytest.approx(theirs)
        assert 0 < rank["bytes"] < rank["parameters"]


def test_ranks_share_members_and_ask_no_reward_twice(tmp_path: Path) -> None:
    one, two = results(on_members, 1, tmp_path / "one")[0], results(on_members, 2, tmp_path / "two")
    assert one["asked"] == 12
    for rank in two:
        assert rank["gradients"] == one["gradients"] and rank["bits"] == one["bits"]
        assert rank["asked"] == 6 and rank["log"] == one["log"]
    three = results(on_members, 3, tmp_path / "two")
    assert [rank["asked"] for rank in three] == [0, 0, 0], "what two ranks have asked, three know"
    assert {rank["bits"] for rank in three} == {one["bits"]}
