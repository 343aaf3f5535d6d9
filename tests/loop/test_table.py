"""The table of stages: their order, what says that one is done, who takes part, and where each iteration begins."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from zopro.compare import jobs
from zopro.compare.plan import Job
from zopro.config import RunConfig
from zopro.loop import table
from zopro.loop.recording import Origin, origin_of
from zopro.loop.run import Run
from zopro.loop.table import walk
from zopro.store.journal import Header, JournalWriter, Step
from zopro.store.rundir import RunDirectory
from zopro.system.launch import Processes
from zopro.zo.records import StepRecord

TRAINED: Any = SimpleNamespace(trains_reward=True)
LOOP = ["policy", "pairs", "refine", "evaluation"]


def config(folder: Path, **options: Any) -> RunConfig:
    return RunConfig(model="m", task="chat", train_data="x", seed=0, output_dir=str(folder), **options)


def opened(options: RunConfig, ranks: int = 1) -> Run:
    processes = Processes()
    processes.size = ranks
    return Run(options, RunDirectory(options, resume=False), processes)


def test_each_iteration_has_the_stages_of_the_loop() -> None:
    before = [("sft", None), ("reward", None), ("evaluation", None)]
    loop = [(name, iteration) for iteration in range(2) for name in LOOP]
    assert [(stage.name, iteration) for stage, iteration in walk(TRAINED, 2)] == [*before, *loop]


def test_without_a_reward_model_its_stages_are_left_out() -> None:
    stages = [(stage.name, iteration) for stage, iteration in walk(SimpleNamespace(trains_reward=False), 2)]
    loop = [(name, iteration) for iteration in range(2) for name in ("policy", "evaluation")]
    assert stages == [("sft", None), ("evaluation", None), *loop]


def test_every_stage_has_an_output_of_its_own(tmp_path: Path) -> None:
    store = opened(config(tmp_path / "run")).store
    stages = list(walk(TRAINED, 2))
    for number, (stage, iteration) in enumerate(stages):
        assert not stage.done(store, iteration)
        output = stage.output(store, *(() if iteration is None else (iteration,)))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        assert [s.done(store, i) for s, i in stages] == [n <= number for n in range(len(stages))]


@pytest.mark.parametrize(
    ("method", "warm_start", "shared"),
    [
        ("zopro", "first_order", [False, True]),
        ("zopro-paper", "sft", [True, True]),
        ("mezo", "spsa", [True, True]),
        ("zopro", "es", [True, True]),
        ("zopro", "guided", [False, True]),
        ("mezo", "fzoo", [True, True]),
        ("guided", "first_order", [False, False]),
        ("rloo", "spsa", [False, False]),
    ],
)
def test_all_ranks_take_part_in_zeroth_order_steps_alone(
    method: str, warm_start: str, shared: list[bool], tmp_path: Path
) -> None:
    options = config(tmp_path / "run", method=method, warm_start=warm_start)
    many, one = opened(options, ranks=2), opened(options)
    for stage, iteration in walk(TRAINED, 2):
        expected = stage.name == "policy" and iteration is not None and shared[iteration]
        assert stage.for_all(many, iteration) is expected
        assert not stage.for_all(one, iteration)


def test_a_comparison_prepares_what_a_run_does_without_its_evaluations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, done = opened(config(tmp_path / "run")), []

    def work(name: str) -> Any:
        return lambda run, models, data, *iteration: done.append((name, *iteration))

    stages = tuple(replace(stage, function=work(stage.name)) for stage in table.STAGES)
    monkeypatch.setattr(table, "STAGES", stages)
    monkeypatch.setattr(jobs, "measure", lambda run, models, data, policy, *given, whole: {"of": policy})
    run.store.reward(0).mkdir(parents=True)
    models, rows = Mock(), {"rows": "", "eval": [], "regressed": False}
    given: Any = (run, models, type("Data", (), rows))
    assert jobs._prepare(*given, Job("prepare", "sft"))["start"]["of"] == run.store.sft()
    assert done == [("sft",)], "the first reward model is there already"
    done.clear()
    assert jobs._prepare(*given, Job("prepare", "iteration"))["start"]["of"] == run.store.policy(0)
    assert done == [("sft",), ("policy", 0), ("pairs", 0), ("refine", 0)]
    assert models.reward_from.call_args[0] == (run.store.reward(1),), "rewards are by the refined one"


def test_where_an_iteration_begins(tmp_path: Path) -> None:
    run = tmp_path / "run"
    sft, initial, policy, reward = run / "sft", run / "initial", run / "policy", run / "reward"
    options = config(run, method="zopro")
    store = RunDirectory(options, resume=False)
    first = {
        "first_order": Origin(run, 0, "rloo", sft),
        "spsa": Origin(run, 0, "mezo", sft),
        "es": Origin(run, 0, "es", sft),
        "sft": Origin(run, 0, "zopro", sft, (sft, initial)),
        None: Origin(run, 0, "zopro", sft),
    }
    assert {start: origin_of(options, store, 0, start) for start in first} == first
    whole = replace(options, lora_r=0)
    assert origin_of(whole, store, 0, "sft").previous_update == (sft, Path("m"))
    for start in first:
        for iteration, folders in ((1, (policy / "000", sft)), (2, (policy / "001", policy / "000"))):
            rewards = reward / f"{iteration:03d}", reward / f"{iteration - 1:03d}"
            expected = Origin(run, iteration, "zopro", folders[0], folders, rewards)
            assert origin_of(options, store, iteration, start) == expected


@pytest.mark.parametrize(
    ("before", "seen", "eps"), [("zopro", [1e-3, 2e-3, math.nan], 2e-3), ("zopro", [math.nan], None), ("es", [0.1], None)]
)
def test_eps_is_looked_for_where_the_iteration_before_ended(
    before: str, seen: list[float], eps: float | None, tmp_path: Path
) -> None:
    options = config(tmp_path / "run", method="zopro")
    store = RunDirectory(options, resume=False)
    writer = JournalWriter(store.journal(1), Header(1, before, "sft", {}, {}))
    for step, value in enumerate(seen):
        writer.write(Step(StepRecord(step, 0, [0.0], [0.0], [0.1], [value], [0.0], 0.0, math.nan, skipped=False)))
    assert origin_of(options, store, 2, None).eps == eps
    assert origin_of(options, store, 1, None).eps is None


def test_along_the_newest_update_that_moved_the_policy(tmp_path: Path) -> None:
    """A step in proportion to the update before it may round to nothing: along 0 there would be noise alone."""
    run = tmp_path / "run"
    options = config(run, method="zopro")
    store = RunDirectory(options, resume=False)
    for folder, weights in ((store.sft(), "a"), *((store.policy(i), weights) for i, weights in enumerate("bccc"))):
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_text(weights)
    for iteration, last in ((1, 0), (2, 1), (3, 1), (4, 1)):
        before = store.policy(last - 1) if last else store.sft()
        origin = origin_of(options, store, iteration, None)
        assert origin.start == store.policy(iteration - 1)
        assert origin.previous_update == (store.policy(last), before)
        assert origin.reward_update == (store.reward(last + 1), store.reward(last))
