"""The whole loop on a tiny model: what is on disk after it, what does not leak, what a stopped run resumes to."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny_runs
from one_run import few_figures, no_embedding
from one_run import no_report as without_report
from tiny_runs import config, fingerprint, rows
from zopro.analysis.reading.checkpoints import of_run
from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.opening import open_all
from zopro.loop.policies import Policies
from zopro.loop.run import Run
from zopro.loop.stages import sample_pairs
from zopro.rewards import RewardModel
from zopro.store.rundir import RunDirectory, read_rows
from zopro.train import methods


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    options = config(folder, tmp_path_factory.mktemp("run") / "run", refine_steps=2)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        few_figures(patch, "trajectory-tsne-3d-product")
        no_embedding(patch)
        summary = pipeline.run(options, quiet=True)
    assert torch.equal(before, torch.get_rng_state()), "a run must leave the global random state alone"
    return options, summary


@pytest.fixture(autouse=True)
def no_report(finished: tuple[RunConfig, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs but the finished one go without their report, which takes longer than they do."""
    without_report(monkeypatch)


def test_run_directory_is_complete(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    options, summary = finished
    run = Path(options.output_dir)
    for name in ("config.yaml", "environment.json", "metrics.jsonl", "report.html", "summary.json"):
        assert (run / name).is_file()
    for adapter in ("initial", "sft", "policy/000", "policy/001", "reward/000", "reward/001", "reward/002"):
        assert (run / adapter / "adapter_model.safetensors").is_file(), adapter
    assert not list(run.rglob("*.partial")), "nothing half-written is left"
    assert json.loads((run / "summary.json").read_text()) == summary
    assert [line["iteration"] for line in summary["evaluations"]] == [None, 0, 1]
    assert summary["iterations"] == 2 and len(summary["samples"]) == 5
    for line in summary["evaluations"]:
        assert line["reward_low"] <= line["reward"] <= line["reward_high"] and line["n"] == 6


def test_run_directory_holds_its_analysis(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    run = Path(finished[0].output_dir)
    analysis = json.loads((run / "analysis.json").read_text())
    assert analysis["iterations"] == [0, 1] and analysis["views"] == ["factors", "product"]
    states = [
        {name: tensor.double() for name, tensor in load_file(run / folder / "adapter_model.safetensors").items()}
        for folder in ("sft", "policy/000", "policy/001")
    ]
    updates = [torch.cat([(b[n] - a[n]).flatten() for n in sorted(a)]) for a, b in pairwise(states)]
    momentum = torch.cosine_similarity(updates[0], updates[1], dim=0).item()
    assert analysis["metrics"]["policy_momentum_cosine"]["factors"] == [None, pytest.approx(momentum)]
    assert (run / "figures" / "trajectory-tsne-3d-product.svg").is_file()
    assert {row["win"] for row in read_rows(run / "evaluations/base.jsonl")} <= {0, 0.5, 1}


def test_first_iteration_is_first_order_and_later_ones_are_not(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    lines = RunDirectory(finished[0], resume=True).metrics()
    policy = [line for line in lines if line["stage"] == "policy" and line.get("loss") is not None]
    assert all(("projected_gradient" in line) == (line["iteration"] > 0) for line in policy)
    assert {line["iteration"] for line in policy} == {0, 1}


def test_every_policy_moved(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    run = Path(finished[0].output_dir)
    states = [
        load_file(run / name / "adapter_model.safetensors") for name in ("initial", "sft", "policy/000", "policy/001")
    ]
    for before, after in pairwise(states):
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[name], after[name]) for name in before)


def test_evaluation_prompts_never_train(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    run = Path(finished[0].output_dir)
    held_out = {row["prompt"] for row in read_rows(run / "evaluations/sft.jsonl")}
    for iteration in ("000", "001"):
        for name in ("samples", "preferences"):
            used = {row["prompt"] for row in read_rows(run / "iterations" / iteration / f"{name}.jsonl")}
            assert used and not used & held_out
    assert [row["prompt"] for row in read_rows(run / "evaluations/000.jsonl")] == [
        row["prompt"] for row in read_rows(run / "evaluations/sft.jsonl")
    ]


def test_prompts_answers_and_rewards_stay_aligned(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a reward that can be computed from the stored text, every stored reward is that of its own row."""
    shutil.copytree(finished[0].output_dir, tmp_path / "run")
    opened = open_all(replace(finished[0], output_dir=str(tmp_path / "run")), resume=True)
    run, models, _ = opened

    def value(prompt: list[int], text: str) -> float:
        return sum(prompt) / 1000 - 5 + len(text) / 7

    def score(model: RewardModel, prompts: list[list[int]], completions: list[list[int]], size: int = 0) -> list[float]:
        return [value(p, t) for p, t in zip(prompts, models.texts(completions), strict=True)]

    monkeypatch.setattr(RewardModel, "score", score)
    sample_pairs(*opened, 0)
    samples = read_rows(run.store.samples(0))
    preferences = read_rows(run.store.preferences(0))
    for row in samples:
        assert row["reward"] == value(models.tokenizer(row["prompt"])["input_ids"], row["completion"])
        assert rows()[row["row"] - 1]["prompt"] in row["prompt"]
    kept = [row for row in samples if row["kept"]]
    least = sorted(abs(row["reward"]) for row in samples)[:4]
    assert sorted(abs(row["reward"]) for row in kept) == least, "60 % of 6, rounded up, those nearest zero"
    assert preferences
    for row in preferences:
        assert len(row["chosen"]) < len(row["rejected"]), "the judge prefers the shorter answer"
        for side in ("chosen", "rejected"):
            assert row[f"{side}_reward"] == value(models.tokenizer(row["prompt"])["input_ids"], row[side])
        own = {r["completion"] for r in kept if r["prompt"] == row["prompt"]}
        assert own & {row["chosen"], row["rejected"]}, "one answer of each pair is the kept sample"


def test_resume_repeats_nothing_and_continues_to_the_same_bits(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path
) -> None:
    options, _ = finished
    whole = fingerprint(Path(options.output_dir))
    stopped = tmp_path / "stopped"
    shutil.copytree(options.output_dir, stopped)
    for output in ("policy/001", "reward/002"):
        shutil.rmtree(stopped / output)
    for output in ("iterations/001/preferences.jsonl", "evaluations/001.json", "summary.json"):
        (stopped / output).unlink()
    first_policy = (stopped / "policy/000/adapter_model.safetensors").stat().st_mtime_ns
    again = replace(options, output_dir=str(stopped))
    with pytest.raises(InputError, match="--resume"):
        pipeline.run(again, quiet=True)
    pipeline.run(again, resume=True, quiet=True)
    assert fingerprint(stopped) == whole
    header = json.loads((stopped / "iterations/001/journal.jsonl").read_text().splitlines()[0])
    assert header["threads"] == json.loads((stopped / "environment.json").read_text())["threads"]
    assert (stopped / "policy/000/adapter_model.safetensors").stat().st_mtime_ns == first_policy
    lines = RunDirectory(again, resume=True).metrics()
    ends = [(line["stage"], line["iteration"]) for line in lines if line.get("event") == "end"]
    assert len(ends) == len(set(ends)), "no stage is counted twice"


def test_a_run_of_another_config_is_refused(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    options, _ = finished
    with pytest.raises(InputError, match=r"belongs to another config \(beta is 0.05 there, 0.5 here\)"):
        pipeline.run(replace(options, beta=0.5), resume=True, quiet=True)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mezo", "evaluation": "together"},
        {"method": "rloo", "warm_start": "sft", "iterations": 1},
        {"method": "guided", "guard_every": 1, "iterations": 1},
        {"method": "guided", "guide": "mixed", "guide_avoid_reward": True, "iterations": 1},
        {"warm_start": "sft", "preset": "paper", "eps": ""},
        {"warm_start": "spsa", "sides": 1, "queries": 2},
        {"warm_start": "es", "population": 4, "iterations": 1},
        {"warm_start": "guided"},
        {"lora_r": 0, "warm_start": "sft"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_methods_and_warm_starts_run_the_same_loop(
    folder: Path, tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(folder, tmp_path / "run", eval_prompts=2, pair_prompts=2, **options)
    references: list[str] = []
    said: list[str] = []
    monkeypatch.setattr(Run, "say", lambda run, line: said.append(line))

    def targeted(inputs: Any) -> Any:
        references.append(inputs.model.config._name_or_path)
        return methods._zeroth_order(inputs, targeted=True)

    monkeypatch.setattr(methods, "targeted", targeted)
    summary = pipeline.run(settings, quiet=True)
    assert summary["method"] == settings.method
    if not settings.lora_r:
        assert set(references) == {str(tmp_path / "run" / "sft")}, "the KL is to the SFT policy in every iteration"
    first_order = [
        line["iteration"]
        for line in RunDirectory(settings, resume=True).metrics()
        if line["stage"] == "policy" and "loss" in line and not {"projected_gradient", "sigma"} & line.keys()
    ]
    if settings.method == "rloo" or (settings.method, settings.guide) == ("guided", "adam"):
        assert set(first_order) == set(range(settings.iterations))
    elif settings.warm_start in ("first_order", "guided") and not METHODS[settings.method].self_starting:
        assert set(first_order) == {0}
    else:
        assert not first_order, "no step of this run may back-propagate through the policy"
    alone = "policy 0: rloo starts by itself, whatever warm_start says"
    assert (alone in said) is (options.get("method") == "rloo")
    untaken = [line.split(":")[1] for line in said if "there is no update" in line]
    assert untaken == ([" guide", " guide_avoid_reward"] if "guide_avoid_reward" in options else [])


def test_ties_end_no_run_and_iteration_share_sets_its_steps(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share = {"policy_steps": 0, "iteration_share": 0.1}
    settings = config(folder, tmp_path / "run", judge="python:tiny_runs:never_decides", iterations=1, **share)
    summary = pipeline.run(settings)
    run = Path(settings.output_dir)
    assert read_rows(run / "iterations/000/preferences.jsonl") == []
    assert "nothing to refine" in capsys.readouterr().err
    assert summary["win_rate"] == 0.5
    old, new = (load_file(run / "reward" / name / "adapter_model.safetensors") for name in ("000", "001"))
    assert all(torch.equal(old[name], new[name]) for name in old)
    lines = RunDirectory(settings, resume=True).metrics()
    steps = [line["step"] for line in lines if line["stage"] == "policy" and line.get("loss") is not None]
    assert max(steps) == 3, "a tenth of 50 training rows, 2 a step"


def test_snapshots_and_a_judge_that_hung_change_nothing_else(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path
) -> None:
    tiny_runs.CALLS.clear()
    run, stuck = tmp_path / "run", {"judge": "python:tiny_runs:gets_stuck", "judge_timeout": 1.0}
    settings = replace(finished[0], output_dir=str(run), snapshot_every=1, **stuck)
    with pytest.raises(InputError, match=r"python:tiny_runs:gets_stuck gave no answer within 1 seconds.*--resume"):
        pipeline.run(settings, quiet=True)
    tiny_runs.FIXED.set()
    pipeline.run(replace(settings, judge_timeout=60.0), resume=True, quiet=True)
    kept = sorted(str(path.relative_to(run)) for path in (run / "snapshots").glob("*/*/*"))
    assert kept == [f"snapshots/{kind}/00{i}/000001" for kind in ("policy", "reward") for i in (0, 1)]
    ours = {name: value for name, value in fingerprint(run).items() if not name.startswith("snapshots")}
    assert ours == fingerprint(Path(finished[0].output_dir))
    assert not list(run.rglob("verdicts.jsonl"))
    policy, _ = of_run(run)
    labels = [checkpoint.label for checkpoint in policy.checkpoints]
    assert labels == ["SFT", "policy 0, step 1", "policy 0", "policy 1, step 1", "policy 1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "no/such/folder"}, "model"),
        ({"train_data": "no-such.jsonl"}, "train_data"),
        (
            {"max_prompt_length": 500},
            "max_prompt_length: .* must fit the model's context of 128",
        ),
        ({"eval_prompts": 1000}, "eval_prompts"),
        ({"judge": "rogue"}, "judge: .*Did you mean 'rouge'"),
        ({"task": "translation"}, "rows.jsonl.*prompt, chosen, rejected"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        pipeline.run(config(folder, tmp_path / "run", **options), quiet=True)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_base_comes_back_pristine(folder: Path, finished: tuple[RunConfig, dict[str, Any]]) -> None:
    options, _ = finished
    run, models, _ = open_all(options, resume=True)
    names = [name for name, _ in models.base.named_parameters()]
    with Policies(models.base, options).open(run.store.policy(1), trainable=True) as model:
        assert any("lora" in name for name, _ in model.named_parameters())
    assert [name for name, _ in models.base.named_parameters()] == names
    assert "forward" not in vars(models.base)
