"""Evolution strategies on many ranks: they share prompts or members, and end at one rank's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from many_ranks import Job, in_turn, results, train
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


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[Any]]]:
    """Both ways of sharing, on 1 and 2 ranks; the answers of members go on to 3."""
    kept = tmp_path_factory.mktemp("kept")
    prompts: dict[str, Job] = {str(greedy): (on_prompts, (greedy,)) for greedy in (False, True)}
    ranks = {size: in_turn(size, {**prompts, "members": (on_members, (kept / str(size),))}) for size in (1, 2)}
    return {**ranks, 3: {"members": results(on_members, 3, kept / "2")}}


@pytest.mark.parametrize("greedy", [False, True])
def test_ranks_share_prompts(greedy: bool, done: dict[int, dict[str, list[Any]]]) -> None:
    one, two = done[1][str(greedy)][0], done[2][str(greedy)]
    assert len(two) == 2
    for rank in two:
        assert rank["gradients"] == one["gradients"] and rank["bits"] == one["bits"]
        for ours, theirs in zip(rank["log"], one["log"], strict=True):
            assert ours == pytest.approx(theirs)
        assert 0 < rank["bytes"] < rank["parameters"]


def test_ranks_share_members_and_ask_no_reward_twice(done: dict[int, dict[str, list[Any]]]) -> None:
    one, two, three = (done[size]["members"] for size in (1, 2, 3))
    assert one[0]["asked"] == 12 and len(two) == 2
    for rank in two:
        assert rank["gradients"] == one[0]["gradients"] and rank["bits"] == one[0]["bits"]
        assert rank["asked"] == 6 and rank["log"] == one[0]["log"]
    assert [rank["asked"] for rank in three] == [0, 0, 0], "what two ranks have asked, three know"
    assert {rank["bits"] for rank in three} == {one[0]["bits"]}
