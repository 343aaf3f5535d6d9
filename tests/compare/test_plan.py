"""Plans and jobs: what is refused, which rates are tried, and names that change with the work."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zopro.compare import run
from zopro.compare.kept import finished
from zopro.compare.plan import Job, Plan
from zopro.config import RunConfig
from zopro.errors import InputError, Stopped

CONFIG = RunConfig(model="m", task="chat", train_data="x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ("zorpo",)}, "methods: must be one of zopro, .*got 'zorpo'. Did you mean 'zopro'?"),
        ({"methods": ()}, "methods: must name at least one method"),
        ({"methods": ("rloo", "rloo")}, "methods: must name each method once, got rloo,rloo"),
        ({"seeds": 0}, "seeds: must be at least 1, got 0"),
        ({"steps": 0}, "steps: one of steps, budget_minutes and answers must be given, greater than 0, got 0, 0.0, 0."),
        ({"budget_minutes": 1.0}, "steps: one of steps, budget_minutes and answers must be given"),
        ({"steps": 0, "budget_minutes": math.inf}, "budget_minutes: must be a finite number, got inf"),
        ({"budget_minutes": math.nan}, "budget_minutes: must be a finite number, got nan"),
        ({"answers": 8}, "steps: one of steps, budget_minutes and answers must be given"),
        ({"steps": 0, "answers": -8}, "steps: one of steps, budget_minutes and answers must be given"),
        ({"points": 0}, "points: must be at least 1"),
        ({"search_trials": 0}, "search_trials: must be at least 1"),
        ({"search_share": 0.0}, r"search_share: must lie in \(0, 1\]"),
        ({"start": "base"}, "start: must be one of sft, iteration, got base"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Plan(**{"methods": ("rloo",), "steps": 4, **options})


def test_equal_numbers_of_answers_are_other_numbers_of_steps() -> None:
    config = replace(CONFIG, prompts_per_step=5, num_generations=4, population=6)
    plan = Plan(("es", "rloo"), answers=100)
    assert [plan.steps_of(name, config) for name in ("es", "es-paper", "rloo", "fzoo", "zopro")] == [3, 3, 5, 5, 5]
    assert Plan(("es",), steps=7).steps_of("es", config) == 7
    with pytest.raises(InputError, match=r"answers: must be enough for a step of es, 30, got 29\."):
        Plan(("es",), answers=29).steps_of("es", config)


def test_rates_lie_around_the_configured_one() -> None:
    plan = Plan(("rloo",), steps=1)
    assert [plan.rate("rloo", CONFIG, power) for power in (-1, 0, 1)] == pytest.approx([2e-4 / 3, 2e-4, 6e-4], rel=1e-5)
    assert plan.rate("zopro", CONFIG) == 1e-4, "the default preset's"
    tuned = replace(CONFIG, learning_rate=0.5)
    assert plan.rate("zopro-paper", tuned) == 1.0, "the paper's preset's: its rates are relative to |mu|"
    assert plan.rate("zopro-paper", replace(tuned, preset="paper")) == 0.5
    paper = replace(CONFIG, preset="paper")
    assert [plan.rate(name, paper) for name in ("zopro", "mezo")] == [1, 1e-4], "without an update there is no |mu|"
    assert plan.rate("zopro", replace(paper, sft_steps=0)) == 1e-4
    assert plan.left_out_rate("zopro-paper", tuned) == (
        "zopro-paper: begins at 1, the paper preset's rate; learning_rate: 0.5 is for the default preset. "
        "--preset paper gives it to zopro-paper."
    )
    others = ("zopro", tuned), ("rloo", tuned), ("zopro-paper", CONFIG), ("zopro-paper", replace(tuned, preset="paper"))
    assert not any(plan.left_out_rate(*other) for other in others)
    assert plan.rate("es", CONFIG) == plan.rate("es-paper", CONFIG) == CONFIG.es_learning_rate
    assert plan.rate("guided", CONFIG) == CONFIG.guided_learning_rate
    assert plan.rate("mezo", replace(CONFIG, learning_rate=0.5), 1) == 1.5


@pytest.mark.parametrize("best", [-3, -1, 0, 1, 3])
@pytest.mark.parametrize("trials", [1, 2, 3, 4, 6])
def test_the_search_climbs_to_the_best_rate_or_as_far_as_its_trials_reach(best: int, trials: int) -> None:
    plan, tried = Plan(("rloo",), steps=1, search_trials=trials), dict[int, float]()
    while (power := plan.next_power(tried)) is not None:
        assert power not in tried
        tried[power] = -abs(power - best)
    assert len(tried) <= trials
    found = max(tried, key=tried.__getitem__)
    enough = best + 1 if best >= 0 else 2 - best  # trials from 0 upwards, and with a first one upwards in vain
    assert found == best if trials >= enough else abs(found) < abs(best)
    assert list(tried)[:2] == [0, 1][:trials]


def test_the_search_goes_down_from_rates_that_fail() -> None:
    plan, tried = Plan(("rloo",), steps=1, search_trials=4), dict[int, float]()
    while (power := plan.next_power(tried)) is not None:
        tried[power] = -math.inf if power > -2 else 1.0
    assert sorted(tried) == [-2, -1, 0, 1]


@pytest.mark.parametrize(("trials", "wanted"), [(4, [6e-3, 2e-3, 6.66667e-4]), (2, [6e-3, 2e-3])])
def test_the_pace_is_told_by_a_lower_rate_where_one_fails(trials: int, wanted: list[float]) -> None:
    """As the search goes down; a machine that gives out is not tried again."""
    tried, stopped = list[float](), False

    def result(job: Job) -> dict[str, float]:
        tried.append(job.learning_rate)
        if stopped:
            raise Stopped("the memory is full")
        if job.learning_rate > 1e-3:
            raise run.JobFailed("it diverged")
        return {"steps": 3, "seconds": 1.5}

    runner: Any = SimpleNamespace(given=replace(CONFIG, first_order_learning_rate=6e-3), result=result)
    plan, probe = Plan(("rloo",), budget_minutes=1.0, search_trials=trials), Job("train", method="rloo")
    with nullcontext() if trials > 2 else pytest.raises(run.JobFailed, match="it diverged"):
        assert run._pace(runner, plan, probe) == 2.0
    assert tried == wanted
    stopped = True
    for ask in (run._pace, run._search):
        with pytest.raises(Stopped, match="the memory is full"):
            ask(runner, plan, probe)
    assert tried == [*wanted, 6e-3, 6e-3]


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


def test_an_earlier_comparison_is_read(tmp_path: Path) -> None:
    plan = Plan(("mezo",), steps=4)
    old = {
        "curve": [{"step": 0, "reward": 1.0, "kl": -0.08}, {"step": 4, "reward": 2.0, "kl": 0.5}],
        "search": [{"kl": 0.2}],
    }
    saved = {"plan": {**asdict(plan), "methods": ["guided"]}, "methods": {"guided": old, "mezo": old}}
    (tmp_path / "compare.json").write_text(json.dumps(saved))
    found = finished(tmp_path / "compare.json", plan)
    assert list(found) == ["guided"], "mezo is to be run again"
    assert found["guided"] == {
        "curve": [{"step": 0, "reward": 1.0, "kl_per_answer": -0.08}, {"step": 4, "reward": 2.0, "kl_per_answer": 0.5}],
        "search": [{"kl_per_answer": 0.2}],
    }
