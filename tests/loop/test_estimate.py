"""What a run will take is said before it is done, and changes nothing; what goes on is said by all stages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from one_run import no_report
from tiny_runs import config, fingerprint
from zopro import cli
from zopro.config import RunConfig
from zopro.loop import estimate, pipeline
from zopro.loop.estimate import Timed, dry_run
from zopro.system import progress

WALK = [
    "sft",
    "reward",
    "evaluation",
    *(f"{name} {i}" for i in (0, 1) for name in ("policy", "pairs", "refine", "evaluation")),
]
"""The stages of a run of two iterations."""


def nothing(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


@pytest.fixture(scope="module")
def runs(finished: tuple[RunConfig, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same run unheard and heard: both folders, what was said, and what was begun."""
    found: dict[str, Any] = {"said": [], "begun": []}
    begin, say = progress.Reporter.begin, progress.Reporter.say

    def noted(self: Any, title: str, *args: Any, **options: Any) -> Any:
        found["begun"].append(title)
        return begin(self, title, *args, **options)

    def heard(self: Any, line: str) -> None:
        found["said"].append(line)
        say(self, line)

    settings = replace(finished[0], output_dir=str(tmp_path_factory.mktemp("run") / "run"))
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        patch.setattr(progress.Reporter, "begin", noted)
        patch.setattr(progress.Reporter, "say", heard)
        pipeline.run(settings)
    return found | {"quiet": Path(finished[0].output_dir), "heard": Path(settings.output_dir)}


def test_an_estimate_changes_no_number(runs: dict[str, Any]) -> None:
    assert fingerprint(runs["heard"]) == fingerprint(runs["quiet"])


def test_it_is_said_before_the_first_stage(runs: dict[str, Any]) -> None:
    (line,) = (line for line in runs["said"] if line.startswith("this run will take about "))
    assert " GB, by one timed step (" in line
    assert runs["begun"].index("timing one step") < runs["begun"].index("[1/11] sft")


def test_every_stage_and_every_long_loop_reports(runs: dict[str, Any]) -> None:
    titles = [title.partition("] ")[2] for title in runs["begun"] if title.startswith("[")]
    assert titles == WALK
    inside = {"reading the data", "loading model", "answering", "scoring", "log-probs of SFT", "judging"}
    inside |= {"rollout", "log-probs", "loss", "calibrating eps", "writing figures", "writing the report", ""}
    assert inside <= set(runs["begun"])


def test_memory_is_that_of_the_largest_batch_that_goes_back(folder: Path, tmp_path: Path) -> None:
    """Of a reward model's pairs both answers; a method that keeps nothing for a backward pass adds none."""

    def peak(**options: Any) -> float:
        found, _ = dry_run(config(folder, tmp_path / "run", **{"sft_steps": 0, **options}))
        return float(found["peak_mb"])

    few, many, twice, thrice = (peak(reward_batch_size=size) for size in (2, 10**6, 2 * 10**6, 3 * 10**6))
    assert many > 2 * few  # few: what this process, with all that it has tested, took at most
    assert twice - many == pytest.approx(thrice - twice, rel=0.1)
    rule = {"reward": f"python:{__name__}:nothing", "judge": "auto", "prompts_per_step": 10**6}
    kept = peak(**rule, method="rloo")
    assert kept > 2 * few and peak(**rule, method="rloo-checkpointed") < kept / 2


def test_training_a_whole_model_keeps_its_moments_and_its_reference(folder: Path, tmp_path: Path) -> None:
    def of(**options: Any) -> float:
        settings = config(folder, tmp_path / "run", **{"lora_r": 0, "sft_steps": 0, "warm_start": "spsa", **options})
        run: Any = SimpleNamespace(config=settings)
        return estimate._of_whole_models(run, torch.nn.Linear(500, 500, bias=False))

    assert [of(method=name) for name in ("rloo", "guided", "mezo")] == [4, 4, 1]
    assert of(method="rloo", beta=0) == of(method="mezo", beta=0, sft_steps=1) == 3
    assert of(method="mezo", beta=0) == 0


def test_one_sided_steps_take_a_pass_for_each_direction() -> None:
    """L(theta) is known from sampling."""
    timed = Timed(call=0.0, sample=0.0, forward=1.0, backward=9.0, peak_mb=1.0, answers=1)
    options = RunConfig(
        model="m", task="chat", train_data="x", prompts_per_step=1, num_generations=2, beta=0.0, reward="exact"
    )
    found = [estimate.seconds_of("policy", False, name, options, 1, timed) for name in ("mezo", "fzoo")]
    assert found == [4.0, 16.0]
    options = replace(options, sides=1, queries=3)
    assert estimate.seconds_of("policy", False, "mezo", options, 1, timed) == 6.0


def test_a_scored_row_is_one_and_prompts_that_repeat_are_sampled_once(folder: Path, tmp_path: Path) -> None:
    for name, word in (("train", "tea"), ("eval", "milk")):
        rows = [{"en": f"{word} {i % 3}", "de": word, "score": i / 8} for i in range(8)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {f"{name}_data": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")}
    options: dict[str, Any] = {
        "task": "translation",
        "judge": "chrf",
        "sft_steps": 0,
        "pair_prompts": 5,
        "max_prompt_length": 64,
        **files,
    }
    found, _ = dry_run(config(folder, tmp_path / "run", **options))
    work = {line["stage"]: line["work"] for line in found["stages"]}
    size = config(folder, tmp_path / "run", **options).reward_batch_size
    assert work["reward"].endswith(f" steps of {size} rows") and work["refine"].endswith(f" steps of {size} pairs")
    assert work["pairs"].startswith("3 prompts, ")
    timed = Timed(call=0.0, sample=0.0, forward=0.0, backward=1.0, peak_mb=1.0, answers=1)
    settings = RunConfig(model="m", task="translation", train_data="x", reward_steps=3, reward_batch_size=2)
    seconds = [estimate.seconds_of("reward", True, "rloo", settings, 1, timed, scores) for scores in (False, True)]
    assert seconds == [12.0, 6.0]


def test_a_dry_run_says_it_all_and_writes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    monkeypatch.chdir(tmp_path)
    long = {"prompt": "tea or " * 60, "chosen": "tea", "rejected": "no"}
    Path("rows.jsonl").write_text((folder / "rows.jsonl").read_text() + json.dumps(long) + "\n")
    settings = config(folder, tmp_path / "run", train_data="rows.jsonl", output_dir="").to_dict()
    Path("config.yaml").write_text(yaml.safe_dump(settings))
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(["run", "config.yaml", "--dry-run", "--json", "--population", "4"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert "population: of no effect with rloo and zopro\n" in err
    assert sorted(tmp_path.rglob("*")) == before
    assert [f"{x['stage']} {x['iteration']}".removesuffix(" None") for x in found["stages"]] == WALK
    assert "; left out 1: prompt is longer than max_prompt_length" in found["rows"]
    assert found["seconds"] == pytest.approx(sum(line["seconds"] for line in found["stages"]), abs=1.0)
    assert found["peak_mb"] > 100
    work = {f"{x['stage']} {x['iteration']}": x["work"] for x in found["stages"]}
    assert work["policy 0"].startswith("2 steps of rloo") and work["policy 1"].startswith("2 steps of zopro")
    assert cli.main(["run", "config.yaml", "--dry-run", "--resume"]) == 2


def test_what_a_gpu_does_at_the_first_call_alone_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("wait"))
    for device, once, expected in (
        ("cpu", False, ["call"]),
        ("cuda", False, ["call", "wait", "call", "wait"]),
        ("cuda", True, ["wait", "call", "wait"]),
    ):
        models: Any = SimpleNamespace(base=SimpleNamespace(device=torch.device(device)))
        assert estimate._timed(models, lambda: calls.append("call") or 7, once)[1] == 7  # type: ignore[func-returns-value]
        assert calls == expected
        calls.clear()
