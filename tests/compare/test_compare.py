"""A comparison from the command line to its files, on a model made on the spot; resumed, extended, and failing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zopro import cli
from zopro.choices import METHODS
from zopro.compare import Plan, compare, jobs, run, worker
from zopro.config import RunConfig
from zopro.demo import model, task
from zopro.errors import InputError, Stopped
from zopro.store.rundir import read_rows

ELSEWHERE = {
    "mezo": "test_from_start_to_end_and_on",
    "guided": "test_from_start_to_end_and_on",
    "es-paper": "a comparison takes it as it takes es: test_plan.py has its steps and its rate",
    "rloo-checkpointed": "rloo, whose memory test_estimate.py has",
}
"""Methods that are not compared from a shared iteration too, and where they are tested."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = tmp_path_factory.mktemp("demo")
    train, test = task.write(made, 0, train_rows=32, test_rows=8)
    talk = [(row["prompt"], row[key]) for row in read_rows(train) for key in ("chosen", "rejected")]
    model.write(made / "model", 0, talk, steps=3)
    return {
        "model": str(made / "model"), "train_data": str(train), "eval_data": str(test), "task": "preference",
        "judge": "python:zopro.demo.task:judge", "device": "cpu", "max_prompt_length": 32, "max_completion_length": 10,
        "sft_steps": 2, "reward_steps": 2, "refine_steps": 1, "pair_prompts": 4, "prompts_per_step": 2,
        "eval_prompts": 6, "policy_steps": 1, "dtype": "float32", "eps": 1e-3,
        "easy_questions": False, "lora_target_modules": "q_proj,down_proj",
    }  # fmt: skip


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs run in this process, for speed; their folders' names."""
    names: list[str] = []

    def launch(described: Path, log: Any) -> int:
        names.append(described.parent.name)
        return worker.main(str(described))

    monkeypatch.setattr(run, "_launch", launch)
    return names


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of every comparison."""
    monkeypatch.setattr(run, "write_plots", lambda result, folder: [])


def config(settings: dict[str, Any], out: Path, **changes: Any) -> RunConfig:
    return RunConfig(**{**settings, "output_dir": str(out), **changes})


def test_from_start_to_end_and_on(
    settings: dict[str, Any],
    launched: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    asked: list[Any] = []
    known = ((True, True, False), (True, False, True), (False, False, True))  # by the start, and by each seed's policy

    def ask(run: Any, models: Any, model: Any) -> Any:
        asked.append(model)
        return [("", right) for right in known[min(len(asked), 3) - 1]]

    monkeypatch.setattr(jobs, "ask", ask)
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("Tell me a joke.", "What is tea?")))
    settings = {**settings, "other_data": str(other), "easy_questions": True}
    tmp_path /= "out"
    plan = Plan(("guided",), seeds=2, steps=2, points=2, search_trials=2)
    result = compare(config(settings, tmp_path), plan, quiet=True)
    assert len(launched) == 2 + 2 + 2, "shared work and inference; the search; the seeds"
    assert json.loads((tmp_path / "compare.json").read_text()) == result
    found = result["methods"]["guided"]
    assert set(found) == {
        "bounded", "curve", "gain", "answers", "answers_a_step", "peak_mb", "seconds_per_step", "final", "final_rewards",
        "learning_rate", "seeds", "search", "texts",
    }  # fmt: skip
    assert found["gain"]["mean"] == pytest.approx(found["curve"][-1]["reward"] - result["start"]["reward"])
    assert [point["step"] for point in found["curve"]] == [0, 1, 2] and found["seeds"] == 2
    assert set(found["curve"][0]) == {"step", "seconds", "reward", "reward_low", "reward_high", "kl_per_answer"}
    seconds = [point["seconds"] for point in found["curve"]]
    assert seconds == sorted(seconds) and seconds[1] > 0
    assert found["learning_rate"] in [line["learning_rate"] for line in found["search"]]
    assert found["curve"][0] == result["start"] and result["start"]["kl_per_answer"] == 0
    assert "KL to SFT of 0.00 nats per answer" in (tmp_path / "compare.md").read_text()
    assert result["reward_quality"]["n"] > 0
    said = f"The reward model on held-out rows: accuracy {result['reward_quality']['accuracy']:.3f}, n "
    assert all(said in (tmp_path / name).read_text("utf-8") for name in ("compare.md", "compare.html"))
    assert found["peak_mb"] > 100 and found["curve"][-1]["kl_per_answer"] > 0
    assert [len(texts) for texts in (result["texts"], found["texts"])] == [3, 3]
    assert found["texts"][0]["completion"] in (tmp_path / "compare.html").read_text("utf-8")
    assert len(asked) == 3, "the start and both seeds at their ends; no point before, no trial"
    before, final = result["before"], found["final"]
    assert (before["remembered"]["known"], before["other_kl_per_answer"], before["other_n"]) == (2, 0, 2)
    assert (final["remembered"]["known_before"], final["remembered"]["forgotten"]) == (2, 1.5)
    assert 0 <= final["degenerate"] <= 1 and 0 <= final["ended"] <= 1 and 1 <= final["length"] <= 10
    assert final["other_n"] == 2 and final["other_kl_per_answer"] <= final["other_kl_per_answer_high"]
    for name in ("compare.md", "compare.html"):
        assert all(text in (tmp_path / name).read_text("utf-8") for text in ("Easy questions kept", "1.5 of 3"))
    for name in ("compare.md", "compare.html", "reward_seconds.png", "reward_kl.pdf", "memory.png"):
        assert (tmp_path / name).stat().st_size > 500

    request.getfixturevalue("no_plots")
    before = len(launched)
    more = compare(config(settings, tmp_path), replace(plan, methods=("guided", "mezo"), seeds=1), quiet=True)
    assert [name.split("-")[0] for name in launched[before:]] == ["mezo"] * 3, "what is finished is not done again"
    assert more["methods"]["guided"]["learning_rate"] == found["learning_rate"]
    before = len(launched)
    again = compare(config(settings, tmp_path), replace(plan, methods=("mezo",)), quiet=True)
    assert len(launched) == before + 1, "a second seed of mezo"
    assert {name: method["seeds"] for name, method in again["methods"].items()} == {"guided": 1, "mezo": 2}
    assert again["gain_ratios"].keys() == again["differences"].keys() == {"guided", "mezo"}
    other = compare(config(settings, tmp_path), replace(plan, methods=("mezo",), seeds=1, points=1), quiet=True)
    assert list(other["methods"]) == ["mezo"], "measured at other points: nothing to set beside it"
    before, one = len(launched), replace(plan, methods=("mezo",), seeds=1, search_trials=1)
    faster = compare(config(settings, tmp_path, learning_rate=0.01), one, quiet=True)
    assert len(launched) == before + 1 and faster["methods"]["mezo"]["learning_rate"] == 0.01, "from the same start"
    with pytest.raises(InputError, match=r"output_dir: .* belongs to another config \(beta is 0.05 there, 0.1 here\)"):
        compare(config(settings, tmp_path, beta=0.1), plan, quiet=True)


@pytest.mark.usefixtures("no_plots")
def test_methods_from_a_shared_iteration(
    settings: dict[str, Any], launched: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tuple(name for name in METHODS if name not in ELSEWHERE)
    settings = {**settings, "eval_prompts": 2, "pair_prompts": 2}
    plan = Plan(names, answers=8, points=1, search_trials=1, start="iteration")
    result = compare(config(settings, tmp_path, population=4), plan, quiet=True)
    assert result["failed"] == {} and tuple(result["methods"]) == names
    assert result["methods"]["zopro-paper"]["learning_rate"] == 1.0
    assert {method["answers"] for method in result["methods"].values()} == {8}
    assert [result["methods"][name]["curve"][-1]["step"] for name in ("es", "zopro")] == [1, 2]
    assert not list(tmp_path.rglob("members-*.jsonl"))
    assert (tmp_path / "shared/policy/000").exists() and (tmp_path / "shared/reward/001").exists()
    said = f"as refined after iteration 0, on held-out rows: accuracy {result['reward_quality']['accuracy']:.3f}, n "
    assert said in (tmp_path / "compare.md").read_text("utf-8")
    other = {"population": 4, "first_order_learning_rate": 0.01}
    before, one = len(launched), replace(plan, methods=("rloo",))
    result = compare(config(settings, tmp_path, **other), one)
    assert (
        "iteration 0, from which all start, was trained at 0.0002; 0.01 is for the trainings" in capsys.readouterr().err
    )
    assert len(launched) == before + 1 and result["methods"]["rloo"]["learning_rate"] == 0.01
    (tmp_path / "shared/policy/000").rename(tmp_path / "shared/policy/kept")
    with pytest.raises(InputError, match=r"another config \(first_order_learning_rate is 0.0002 there, 0.01 here"):
        compare(config(settings, tmp_path, **other), one, quiet=True)


@pytest.mark.usefixtures("no_plots")
def test_a_budget_of_time(settings: dict[str, Any], launched: list[str], tmp_path: Path) -> None:
    plan = Plan(("guided",), budget_minutes=0.02, points=2, search_trials=1)
    found = compare(config(settings, tmp_path), plan, quiet=True)["methods"]["guided"]
    assert 0.2 < found["curve"][-1]["seconds"] < 6
    assert len(launched) == 4, "prepare, inference, a probe of the pace, the training"


@pytest.fixture
def words(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    path = tmp_path / "config.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()))
    short = ["--steps", "1", "--points", "1", "--search-trials", "1"]
    return ["compare", str(path), *short, "--out", str(tmp_path / "out"), "--methods"]


@pytest.mark.usefixtures("no_plots")
def test_the_command_and_a_method_that_fails_leaves_the_others(
    words: list[str], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    codes = [1]

    def launch(described: Path, log: Any) -> int:
        if described.parent.name.startswith("mezo"):
            log.write("Traceback ...\nRuntimeError: out of memory\n")
            return codes[-1]
        return worker.main(str(described))

    monkeypatch.setattr(run, "_launch", launch)
    assert cli.main([*words, "mezo,guided", "--json"]) == 0
    out, said = capsys.readouterr()
    printed = json.loads(out)
    assert re.search(r"^\d+ training rows, 6 held-out prompts", said, re.MULTILINE) and printed["prompts"] == 6
    assert printed["methods"]["guided"]["seeds"] == 1 and (tmp_path / "out/compare.json").exists()
    assert list(printed["methods"]) == ["guided"] and "out of memory" in printed["failed"]["mezo"]
    assert "mezo failed: RuntimeError: out of memory" in (tmp_path / "out/compare.md").read_text()
    refused, failing = (Plan(("mezo",), steps=1, points=1, search_trials=1, against=other) for other in ("rloo", ""))
    with pytest.raises(InputError, match=r"^against: must be a method that is compared, got rloo. Name it in --methods"):
        compare(config(settings, tmp_path / "refused"), refused, quiet=True)
    assert not (tmp_path / "refused").exists()  # before anything has run
    with pytest.raises(InputError, match=r"methods: none could be run; mezo: RuntimeError: out of memory"):
        compare(config(settings, tmp_path / "out"), failing, quiet=True)
    codes.append(-9)
    with pytest.raises(Stopped, match=r"methods: none could be run; mezo: a process was killed by SIGKILL"):
        compare(config(settings, tmp_path / "out"), failing, quiet=True)


def test_the_length_of_a_trial(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """`--search-share` of a training, a quarter of it by default."""
    planned: list[Plan] = []

    def compared(config: Any, plan: Plan) -> Any:
        planned.append(plan)
        raise InputError("enough")

    monkeypatch.setattr("zopro.compare.compare", compared)
    for more in (["guided"], ["guided", "--search-share", "0.5"], ["guided", "--search-share", "2"]):
        assert cli.main([*words, *more]) == 2
    job = run.Job("train", "sft", "guided", 0, 1e-3, 8)
    assert [plan.trial(job).steps for plan in planned] == [2, 4]
    assert "--search-share: must lie in (0, 1]" in capsys.readouterr().err


def test_a_bad_command(words: list[str], tmp_path: Path, capsys: Any) -> None:
    """The model is refused by the first job, in its own process, whose one line comes through."""
    assert cli.main([*words, "guidde"]) == 2
    assert "Did you mean 'guided'?" in capsys.readouterr().err
    assert cli.main([*words, "guided", "--model", str(tmp_path / "nothing")]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("zopro: error: model: no folder and no Hub id of that name")


def short(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    return [None if not text else 1 / len(text) for text in completions]


@pytest.mark.usefixtures("no_plots")
def test_rewards_of_ones_own_are_compared_without_a_reward_model(
    settings: dict[str, Any], launched: list[str], tmp_path: Path
) -> None:
    rows = [{"prompt": row["prompt"]} for row in read_rows(Path(settings["train_data"]))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = {"task": "verifiable", "train_data": str(tmp_path / "rows.jsonl"), "eval_data": ""}
    mine |= {
        "reward": [f"python:{__name__}:short", "length:1-2"],
        "sft_steps": 0,
        "warm_start": "spsa",
        "num_generations": 2,
    }
    plan = Plan(("zopro", "es"), steps=1, points=1, search_trials=1, start="iteration")
    made = config({**settings, **mine}, tmp_path / "out", population=4, iterations=1)
    found = compare(made, plan, quiet=True)
    assert not found["failed"] and set(found["methods"]) == {"zopro", "es"}
    assert all(0 <= reward <= 2 for method in found["methods"].values() for reward in method["final_rewards"][0])
    assert not (tmp_path / "out" / "shared" / "reward").exists()
    left = [found["before"], *(method["final"] for method in found["methods"].values())]
    assert all([*state["quality"]] == made.reward for state in left), "each by itself"
    total = sum(value["mean"] for value in found["before"]["quality"].values())
    assert total == pytest.approx(found["start"]["reward"])
