"""Plans and jobs: what is refused, which rates are tried, and names that change with the work."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from zopro.compare.plan import Job, Plan
from zopro.config import RunConfig
from zopro.errors import InputError

CONFIG = RunConfig(model="m", task="chat", train_data="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("zorpo",)}, "methods: must be among zopro, .*got 'zorpo'. Did you mean 'zopro'?"),
        ({"methods": ()}, "methods: must name at least one method"),
        ({"methods": ("rloo", "rloo")}, "methods: must differ, got rloo,rloo"),
        ({"seeds": 0}, "seeds: must be at least 1, got 0"),
        ({"steps": 0}, "steps: one of steps and budget_minutes must be given"),
        ({"budget_minutes": 1.0}, "steps: one of steps and budget_minutes must be given"),
        ({"points": 0}, "points: must be at least 1"),
        ({"learning_rates": 0}, "learning_rates: must be at least 1"),
        ({"search_share": 0.0}, r"search_share: must lie in \(0, 1\]"),
        ({"start": "base"}, "start: must be one of sft, iteration, got base"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(**{"methods": ("rloo",), "steps": 4, **options})


def test_rates_lie_around_the_configured_one() -> None:
    plan = Plan(("rloo",), steps=1)
    assert plan.rates("rloo", CONFIG) == pytest.approx([2e-4 / 3, 2e-4, 6e-4], rel=1e-5)
    assert plan.rates("zopro", CONFIG)[1] == 1e-4, "the default preset's"
    tuned = replace(CONFIG, learning_rate=0.5)
    assert plan.rates("zopro-paper", tuned)[1] == 1.0, "the paper's preset's: its rates are relative to |mu|"
    assert plan.rates("zopro-paper", replace(tuned, preset="paper"))[1] == 0.5
    assert replace(plan, learning_rates=1).rates("guided", CONFIG) == [CONFIG.guided_learning_rate]
    assert replace(plan, learning_rates=2).rates("mezo", replace(CONFIG, learning_rate=0.5)) == [0.5, 1.5]


def test_a_job_s_folder_is_told_apart_by_everything_it_does() -> None:
    job = Job("train", "sft", "rloo", 0, 1e-4, 40, 0.0, 5)
    changed = [{"seed": 1}, {"learning_rate": 2e-4}, {"steps": 41}, {"points": 4}, {"start": "iteration"}]
    assert len({job.name, *(replace(job, **change).name for change in changed)}) == 6
    assert job.name == replace(job).name and job.name.startswith("rloo-seed0-lr0.0001-")


def test_a_trial_is_shorter_and_looks_at_other_prompts() -> None:
    plan = Plan(("rloo",), budget_minutes=1.0)
    trial = plan.trial(Job("train", "sft", "rloo", 0, 1e-4, 42, 60.0, 5))
    assert (trial.steps, trial.budget_seconds, trial.points, trial.prompts) == (11, 15.0, 1, "search")
    assert trial.marks() == [11]
    assert Job("train", steps=2, points=5).marks() == [1, 2]
