"""A run whose rewards are functions: no reward model, no judge, no answers to learn from, and no backward pass."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from commands import typed
from one_run import few_figures, metrics, no_figures, no_report, page
from tiny_runs import NAMES, config, fingerprint, write_inputs
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import export, pipeline
from zopro.loop.replay import replay

SEEN: list[dict[str, Any]] = []
GIVEN: list[dict[str, Any]] = []  # what `finished` saw


def rows() -> list[dict[str, Any]]:
    return [{"prompt": f"{a} or {b}?", "answer": a, "level": i} for i, a in enumerate(NAMES) for b in NAMES if a != b]


def short(prompts: list[str], completions: list[str], level: list[int], **columns: Any) -> list[float]:
    """A reward with a column of its own: fewer letters are better."""
    SEEN.append({"prompts": prompts, "completions": completions, "level": level, **columns})
    return [1 / (1 + len(text)) for text in completions]


def settings(folder: Path, out: Path, **options: Any) -> RunConfig:
    (folder / "verifiable.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    mine = {
        "task": "verifiable", "train_data": str(folder / "verifiable.jsonl"), "method": "mezo", "warm_start": "spsa",
        "reward": ["contains", f"python:{__name__}:short"], "reward_weights": [1.0, 0.5], "sft_steps": 0,
        "dtype": "float32", "eval_prompts": 4, "eval_samples": 2, "eval_greedy": True, "num_generations": 2,
        "judge": "auto",
    }  # fmt: skip
    return config(folder, out, **{**mine, **options})


class Backward(RuntimeError):
    """Somebody called for a gradient of the model."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def forward_only(patch: pytest.MonkeyPatch) -> None:
    """Let a run's stages fail where an operation keeps a tensor for a backward pass, or one goes back through a model.

    What transformers calls backward of a step is a number without a graph behind it.
    """
    loop, backward = pipeline._loop, torch.autograd.backward

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise Backward(f"a tensor of shape {tuple(tensor.shape)} was kept for a backward pass")

    def watched(*args: Any, **kwargs: Any) -> Any:
        hooks = torch.autograd.graph.saved_tensors_hooks(refuse, lambda saved: saved)
        with hooks, pytest.MonkeyPatch.context() as inner:  # not before: loading a model tries what it can do
            inner.setattr(torch.autograd, "backward", only_of_a_number)
            inner.setattr(torch.autograd, "grad", lambda *args, **kwargs: only_of_a_number(args[0]))
            return loop(*args, **kwargs)

    def only_of_a_number(tensors: Any, *args: Any, **kwargs: Any) -> None:
        (tensor,) = tensors if isinstance(tensors, tuple) else (tensors,)
        while (behind := tensor.grad_fn if isinstance(tensor, torch.Tensor) else tensor) is not None:
            if not any(name in behind.name() for name in ("_BaseClassBackward", "AccumulateGrad", "Div", "Mul")):
                raise Backward(f"{behind.name()} is no number that the step hands over")
            tensor = next((before for before, _ in behind.next_functions if before is not None), None)
        backward(tensors, *args, **kwargs)

    patch.setattr(pipeline, "_loop", watched)


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    made = settings(folder, tmp_path_factory.mktemp("run") / "run")
    SEEN.clear()
    with pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        forward_only(patch)
        found = pipeline.run(made, quiet=True)
    GIVEN[:] = SEEN
    return made, found


def test_only_the_stages_of_the_policy_run(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    made, found = finished
    run = Path(made.output_dir)
    ended = [(line["stage"], line["iteration"]) for line in metrics(run) if line.get("event") == "end"]
    loop = [(stage, i) for i in range(2) for stage in ("policy", "evaluation")]
    assert ended == [("sft", None), ("evaluation", None), *loop]
    assert not (run / "reward").exists() and not list(run.glob("iterations/*/samples.jsonl"))
    assert found["reward_quality"] == {} and page(run)


def test_a_run_that_goes_back_through_the_model_would_be_caught(folder: Path, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Backward):
        forward_only(patch)
        pipeline.run(settings(folder, tmp_path / "run", method="rloo", iterations=1), quiet=True)


def test_a_population_goes_forward_only_and_is_rewarded_by_functions(folder: Path, tmp_path: Path) -> None:
    options = {"method": "es", "population": 4, "anchor": 0.1, "noise": "signs", "eval_samples": 1, "reward_weights": []}
    made = settings(folder, tmp_path / "run", **options)
    SEEN.clear()
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        forward_only(patch)
        found = pipeline.run(made, quiet=True)
    assert {len(call["prompts"]) for call in SEEN} >= {2} and found["evaluations"][-1]["accuracy"] is not None
    steps = [line for line in metrics(tmp_path / "run") if line["stage"] == "policy" and line.get("reward") is not None]
    assert [line["iteration"] for line in steps] == [0, 0, 1, 1] and steps[-1]["answers"] == 2 * 4 * 2
    assert replay(tmp_path / "run", tmp_path / "first", iteration=0)["equal"]
    assert replay(tmp_path / "run", tmp_path / "out")["equal"], "along signs of the first iteration's update"


class Killed(BaseException):
    """As a kill: no handler for errors may see it."""


def mortal(completions: list[str], **columns: Any) -> list[float]:
    if len(SEEN) == MORTAL.get("at"):
        raise Killed
    SEEN.append({"completions": completions})
    return [len(text) % 7 / 7 for text in completions]


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics but for what a clock measured."""
    volatile = {"time", "seconds", "peak_rss_mb", "step_time"}
    return [{name: value for name, value in line.items() if name not in volatile} for line in metrics(run)]


MORTAL: dict[str, int] = {}


@pytest.mark.parametrize("lora_r", [4, 0])
def test_a_population_killed_in_a_generation_asks_for_the_rest_only(lora_r: int, folder: Path, tmp_path: Path) -> None:
    """Of all parameters too, whose checkpoint holds none: the journal rebuilds them, with their momentum and anchor."""
    options = {
        "method": "es", "population": 4, "momentum": 0.9, "anchor": 0.1, "iterations": 1, "policy_steps": 4,
        "reward": ["length:1-30", f"python:{__name__}:mortal"], "checkpoint_steps": 2, "lora_r": lora_r,
    }  # fmt: skip
    asked: dict[str, list[Any]] = {}
    members = 4 * 4  # of all generations
    for name in ("whole", "again"):
        made = settings(folder, tmp_path / name, **options)
        SEEN.clear()
        with pytest.MonkeyPatch.context() as patch:
            no_report(patch)
            if name == "again":
                evaluated = len(asked["whole"]) - members
                MORTAL["at"] = evaluated // 2 + members - 2  # the third member of the last generation
                with pytest.raises(Killed):
                    pipeline.run(made, quiet=True)
                MORTAL.clear()
                assert list((tmp_path / name / "trainer").rglob("members-*.jsonl"))
            pipeline.run(made, quiet=True, resume=name == "again")
        asked[name] = [*SEEN]
    assert asked["again"] == asked["whole"]
    assert numbers(tmp_path / "whole") == numbers(tmp_path / "again")
    assert fingerprint(tmp_path / "whole") == fingerprint(tmp_path / "again")
    assert not list((tmp_path / "again").rglob("members-*.jsonl"))


def test_functions_get_the_row_as_it_is(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    by_prompt = {row["prompt"]: row for row in rows()}
    assert len(GIVEN) > 4 and any(len(call["prompts"]) == 4 for call in GIVEN)  # of a step: 2 prompts, 2 answers each
    for call in GIVEN:
        for prompt, answer, level in zip(call["prompts"], call["answer"], call["level"], strict=True):
            assert (by_prompt[prompt]["answer"], by_prompt[prompt]["level"]) == (answer, level)
        assert len(call["completion_ids"]) == len(call["completions"]) and "prompt" not in call


def has(answer: str, word: str) -> float:
    return float(word in re.split(r"\W+", answer.lower()))


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations" / f"{name}.jsonl").read_text().splitlines()]


def test_evaluations_are_what_the_answers_say(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    made, found = finished
    run = Path(made.output_dir)
    start, end = lines(run, "sft"), lines(run, "001")
    assert not (run / "evaluations/base.jsonl").exists(), "without fine-tuning the start is the base model"
    for row in (*start, *end):
        right = has(row["completion"], row["reference"])
        assert row["reward"] == pytest.approx(right + 0.5 / (1 + len(row["completion"])))
        right = has(row["greedy"], row["reference"])
        assert row["greedy_accuracy"] == right
        assert row["greedy_reward"] == pytest.approx(right + 0.5 / (1 + len(row["greedy"])))
        assert row["passed"] >= row["accuracy"]
    first, last = found["evaluations"][0], found["evaluations"][-1]
    for line, its in ((first, start), (last, end)):
        assert line["reward"] == pytest.approx(fmean(row["sampled_reward"] for row in its))
        assert line["greedy_reward"] == pytest.approx(fmean(row["greedy_reward"] for row in its))
        assert line["accuracy"] == fmean(row["accuracy"] for row in its) <= line["pass_at_k"]
        assert line["accuracy_low"] <= line["accuracy"] <= line["accuracy_high"]
        assert line["rewards"]["contains"] + 0.5 * line["rewards"][made.reward[1]] == pytest.approx(line["reward"])
        assert line["samples"] == 2 and 0 <= line["ended"] <= 1 and 0 < line["length"] <= made.max_completion_length
    assert "reward_gain" not in first
    for name, of in (("reward_gain", "sampled_reward"), ("greedy_reward_gain", "greedy_reward")):
        differences = [after[of] - before[of] for before, after in zip(start, end, strict=True)]
        half = 1.959964 * stdev(differences) / len(differences) ** 0.5
        assert last[name] == pytest.approx(fmean(differences))
        assert last[f"{name}_high"] == pytest.approx(fmean(differences) + half, abs=1e-6)
    assert last["win_rate"] == fmean(row["win"] for row in end)


def test_it_can_be_replayed_exported_asked_and_analysed(
    finished: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Path(finished[0].output_dir)
    for iteration in range(2):
        assert replay(run, tmp_path / f"replayed{iteration}", iteration=iteration)["equal"] is True
    assert export.export(str(run), str(tmp_path / "exported"))["kind"] == "adapter"
    assert typed(capsys, "generate", run, "--prompt", "tea or cake?")[0] == 0
    few_figures(monkeypatch)
    assert typed(capsys, "analyse", run, "--projections", "pca", "--out", tmp_path / "analysis")[0] == 0
    numbers = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert numbers["reward"] == [] and len(numbers["policy"]) == 3
    assert set(numbers["metrics"]["update_angle_degrees"]["product"]) == {None}
    assert numbers["metrics"]["policy_momentum_cosine"]["product"][1] is not None
    assert list(numbers["trajectories"]["product"]["pca"]) == ["policy", "explained_variance"]
    shown = page(tmp_path / "analysis")
    assert "How the policy moved" in shown and "NaN" not in shown


LATER: list[int] = []


def breaks(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """`short`, which fails in its third call, until it is mended."""
    LATER.append(len(prompts))
    if len(LATER) == 3:
        raise ZeroDivisionError("by zero")
    return short(prompts, completions, **columns)


def test_a_reward_that_raises_loses_nothing(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": [f"python:{__name__}:breaks"], "reward_weights": []}
    options |= {"checkpoint_steps": 1, "iterations": 1}
    runs = [settings(folder, tmp_path / name, **options) for name in ("broken", "whole")]
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        LATER.clear()
        with pytest.raises(InputError) as error:
            pipeline.run(runs[0], quiet=True)
        assert str(error.value) == (
            "reward function 'breaks': must return 4 numbers, but raised ZeroDivisionError: by zero. Fix it. "
            "Then continue with --resume: what is finished is kept."
        )
        assert len(LATER) == 3
        for made, resume in zip(runs, (True, False), strict=True):
            LATER.extend([0] * 3)
            pipeline.run(made, quiet=True, resume=resume)
    assert fingerprint(tmp_path / "broken") == fingerprint(tmp_path / "whole") != {}


def test_a_trained_reward_and_a_function_are_weighed_in_one_run(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"reward": ["model", "length:1-1"], "reward_weights": [1.0, 0.5], "method": "mezo"}
    made = config(folder, tmp_path / "run", iterations=1, warm_start="spsa", dtype="float32", **options)
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        found = pipeline.run(made, quiet=True)
    assert {"reward", "pairs", "refine"} <= found["stages"].keys() and found["reward_quality"]["n"] > 0
    for line in found["evaluations"]:
        parts = line["rewards"]
        assert line["reward"] == pytest.approx(parts["model"] + 0.5 * parts["length:1-1"]) != parts["model"]
    logged = [line for line in metrics(tmp_path / "run") if line["stage"] == "policy" and "reward" in line]
    for line in logged:
        assert line["reward"] == pytest.approx(line["rewards/model"] + 0.5 * line["rewards/length:1-1"], abs=1e-5)
