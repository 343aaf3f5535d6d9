"""Which rows learning rates are searched on and which are trained on; what answers are held against."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zopro.compare import jobs
from zopro.compare.jobs import search_items, training_items
from zopro.compare.plan import Job
from zopro.errors import InputError
from zopro.loop.answers import Measured
from zopro.loop.rewarding import Scores
from zopro.store.layout import Layout


def shares(prompts: str, eval_prompts: int) -> tuple[str, str]:
    """Of rows with these prompts, a letter each: those of the search, and those of the training."""
    run: Any = SimpleNamespace(config=SimpleNamespace(eval_prompts=eval_prompts))
    data: Any = SimpleNamespace(train=[SimpleNamespace(prompt=letter) for letter in prompts])
    searched, trained = (find(run, data) for find in (search_items, training_items))
    return tuple("".join(item.prompt for item in items) for items in (searched, trained))


@pytest.mark.parametrize(
    ("prompts", "eval_prompts", "wanted"),
    [
        ("abcdefgh", 9, ("gh", "abcdef")),
        ("abcdefgh", 1, ("h", "abcdefg")),
        ("ab", 9, ("b", "a")),
        ("a", 9, ("a", "a")),
        ("abcdefghhgfedcba", 9, ("ba", "cdefghhgfedc")),
        ("abcdabcd", 9, ("d", "abcabc")),
        ("aaaaaaaa", 9, ("a", "aaaaaaaa")),
    ],
)
def test_no_prompt_of_the_search_is_trained_on(prompts: str, eval_prompts: int, wanted: tuple[str, str]) -> None:
    """Where prompts have several rows too; where there is one alone, both have it."""
    assert shares(prompts, eval_prompts) == wanted


def test_answers_are_held_against_references_beside_a_reward_model() -> None:
    data: Any = SimpleNamespace(task=SimpleNamespace(metric="chrf"))
    items: list[Any] = [SimpleNamespace(example=SimpleNamespace(reference=text)) for text in ("Ein Haus.", None)]
    found = jobs._qualities(data, Scores([0.5, 0.5], {"model": [0.5, 0.5]}), ["Ein Haus.", "Hm."], items)
    assert found == {"chrf": [pytest.approx(100), None]}
    several = Scores([1.0, 1.0], {"chrf": [0.5, 0.5], "mine": [math.nan, 0.5]})
    found = jobs._qualities(data, several, ["a", "b"], items)
    assert {name: jobs.prompt_means(values, 1) for name, values in found.items()} == {
        "chrf": [0.5, 0.5], "mine": [None, 0.5],
    }  # fmt: skip


def test_a_prompt_counts_by_the_mean_of_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval_samples` of them; those of the search have one. All methods are paired: no reward at all is 0."""
    counts: list[int] = []
    rewards = [1.0, 0.0, math.nan, 0.5, math.nan, math.nan]

    def measure(run: Any, models: Any, items: Any, policy: Any, seed: int, rewarded: Any, count: int, **more: Any) -> Any:
        counts.append(count)
        every = rewards[: len(items) * count]
        return Measured([[7], [7, 7]] * (len(every) // 2), Scores(every, {"mine": every}), [0.25] * len(every))

    monkeypatch.setattr(jobs.answers, "measure", measure)
    monkeypatch.setattr(jobs.answers, "ends", lambda models, ids: [len(row) == 1 for row in ids])
    monkeypatch.setattr(jobs.answers, "divergences", lambda *args: [])
    example = SimpleNamespace(asked="", reference=None)
    items = [SimpleNamespace(prompt=letter, example=example) for letter in "abc"]
    data: Any = SimpleNamespace(eval=items, train=[*items, *items], other=[], task=SimpleNamespace(metric=None))
    models: Any = SimpleNamespace(
        rewards_with=lambda folder: None, texts=lambda ids: [" ".join(f"word{i}" for i in row) for row in ids]
    )
    config = SimpleNamespace(eval_prompts=2)
    run: Any = SimpleNamespace(config=config, store=Layout("shared"), seed=lambda *words: 0)
    found = jobs.measure(run, models, data, Path("policy"), Job("train"), 2, whole=True)
    assert found["rewards"] == [0.5, 0.5, 0.0] and len(found["kl_per_answer"]) == 6
    assert found["ended"] == [0.5] * 3 and found["length"] == [1.5] * 3 and len(found["degenerate"]) == 3
    assert [(text["prompt"], text["reward"]) for text in found["texts"]] == [("a", 1.0), ("b", 0.0), ("c", 0.0)]
    jobs.measure(run, models, data, Path("policy"), Job("train", prompts="search"), 2)
    assert counts == [2, 1]


def test_a_training_that_max_kl_ends_is_measured_where_it_ended() -> None:
    pace, kept = jobs.Pace(Job("train", method="rloo", steps=10, points=2)), list[int]()
    pace.save = kept.append
    for step in range(1, 8):
        pace.on_step_end(None, SimpleNamespace(global_step=step), SimpleNamespace())
    pace.on_train_end(None, SimpleNamespace(global_step=7), SimpleNamespace())
    assert kept == [step for step, _ in pace.points] == [5, 7] and pace.steps == 7
    pace.on_train_end(None, SimpleNamespace(global_step=7), SimpleNamespace())
    assert kept == [5, 7], "once"


def test_a_reward_model_is_measured_as_the_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of trainings that start from iteration 0 it is the one refined after that."""
    rows = [SimpleNamespace(prompt="q", example=SimpleNamespace(chosen="a", rejected="b", score=s)) for s in (1.0, 2.0)]
    measured: Any = SimpleNamespace(accuracy=lambda pairs, size: {"n": len(pairs)}, correlation=lambda rows, size: {})
    opened = list[Path]()
    models: Any = SimpleNamespace(reward_from=lambda folder: opened.append(folder) or measured)
    config = SimpleNamespace(trains_reward=True, eval_batch_size=4, eval_samples=2)
    run: Any = SimpleNamespace(config=config, store=Layout("shared"))
    data: Any = SimpleNamespace(regressed=False, eval=rows, rows="2 rows")
    monkeypatch.setattr(jobs, "walk", lambda config, iteration: ())
    monkeypatch.setattr(jobs, "measure", lambda *args, **options: {})
    found = jobs._prepare(run, models, data, Job("prepare", "iteration"))
    assert found["reward_quality"] == {"n": 2} and opened == [Path("shared/reward/001")]
    assert jobs._prepare(run, models, data, Job("prepare", "sft")) == {"start": {"samples": 2}, "rows": "2 rows"}, (
        "its stage did"
    )


def test_a_stop_while_measuring_costs_neither_the_training_nor_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = list[str]()

    def trained(*args: Any) -> dict[str, Any]:
        done.append("train")
        return {"points": [(1, 0.5), (2, 1.0)], "steps": 2, "seconds": 1.0, "peak_mb": 1.0}

    def measure(run: Any, models: Any, data: Any, policy: Path, job: Job, samples: int, whole: bool) -> dict[str, Any]:
        done.append(policy.name)
        assert samples == 1, "as the start was, which an earlier version measured"
        if done.count("000002") == 1:
            raise KeyboardInterrupt
        return {"rewards": [0.25], "kl_per_answer": [0.5], "whole": whole}

    monkeypatch.setattr(jobs, "_trained", trained)
    monkeypatch.setattr(jobs, "measure", measure)
    begun = tmp_path / Job("prepare").name
    begun.mkdir()
    (begun / "result.json").write_text(json.dumps({"start": {"rewards": [0.5]}}))
    tmp_path /= "train"
    tmp_path.mkdir()
    nothing: Any = None
    with pytest.raises(KeyboardInterrupt):
        jobs._train(nothing, nothing, nothing, Job("train"), tmp_path)
    found = jobs._train(nothing, nothing, nothing, Job("train"), tmp_path)
    assert done == ["train", "000001", "000002", "000002"]
    whole = {"rewards": [0.25], "kl_per_answer": [0.5], "step": 2, "seconds": 1.0, "whole": True}
    assert found["points"] == [{**whole, "step": 1, "seconds": 0.5, "whole": False}, whole]
    assert json.loads(json.dumps(found)) == jobs._train(nothing, nothing, nothing, Job("train"), tmp_path)
    (tmp_path / "trained.json").write_text("{}")
    with pytest.raises(InputError, match=r"trained.json': must be as zopro has written it, got a damaged file"):
        jobs._train(nothing, nothing, nothing, Job("train"), tmp_path)


def test_a_training_that_begins_anew_asks_for_all_its_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that one that was stopped has left would cost no seconds now."""
    for left in ("points/000001.json", "trainer/members-0.jsonl"):
        (tmp_path / left).parent.mkdir()
        (tmp_path / left).touch()

    def begun(*args: Any) -> Any:
        assert not list(tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "job_trainer", begun)
    nothing: Any = None
    with pytest.raises(KeyboardInterrupt):
        jobs._trained(nothing, nothing, nothing, Job("train"), tmp_path)


@pytest.mark.parametrize("kind", ["prepare", "inference", "train"])
def test_a_comparison_goes_on_with_the_threads_that_it_was_begun_with(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    run: Any = SimpleNamespace(store=SimpleNamespace(threads=lambda: before + 1))
    monkeypatch.setattr(jobs, "open_all", lambda config, resume: (run, None, None))
    monkeypatch.setattr(jobs, f"_{kind}", lambda *args: {"threads": torch.get_num_threads()})
    config: Any = SimpleNamespace(output_dir="shared")
    assert jobs.do_job(Job(kind), config, Path("folder")) == {"threads": before + 1}
    assert torch.get_num_threads() == before


def test_trainings_are_measured_as_the_start_was(tmp_path: Path) -> None:
    begun = tmp_path / Job("prepare", "iteration").name
    begun.mkdir()
    (begun / "result.json").write_text(json.dumps({"start": {"rewards": [0.5], "samples": 3}}))
    assert jobs.samples_of(tmp_path, Job("train", "iteration")) == 3
