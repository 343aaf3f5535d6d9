"""`zopro replay`: from the starting adapter and the journal alone to the trained bits."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from archived import closed, read_only
from one_run import no_report
from tiny_runs import config, rows, write_inputs
from zopro import cli
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.replay import replay
from zopro.store.journal import read
from zopro.train.directed import DirectedTrainer

STEPS = 3
FEW = {"policy_steps": STEPS, "eval_prompts": 2, "pair_prompts": 3}
MOMENTS = {"momentum": 0.9, "second_moment": 0.9, "anchor": 0.1}
RUNS: dict[str, dict[str, Any]] = {
    "zopro": {"eps": ""},
    "zopro-paper": {"preset": "paper", "eps": "", "warm_start": "sft", "weight_decay": 0.1, "decay": "exponential"},
    "mezo": {"method": "mezo", "queries": 2, "sides": 1, "noise": "rademacher"},
    "es": {"method": "es", "targeted": True, "noise": "low_rank", "population": 4, "sigma": "auto", **MOMENTS},
    "es, full": {"method": "es", "lora_r": 0, "population": 2, "momentum": 0.5, "greedy": True},
    "full, gaussian": {"lora_r": 0, "warm_start": "sft", "noise": "gaussian", "lora_target_modules": "all-linear"},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations; the policy as it was after every step of each is kept beside it."""
    kind = "gpt_neox" if request.param == "full, gaussian" else "llama"  # whose head has another name in the base's files
    folder = write_inputs(tmp_path_factory.mktemp("inputs"), kind=kind)
    out = tmp_path_factory.mktemp("run") / "run"
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def keep(trainer: Any, *args: Any) -> Any:
        step = trainer.state.global_step
        tensors = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        torch.save(tensors, out.with_name(f"{len(kept)}-{step}.pt"))
        kept[len(kept)] = tensors
        return original(trainer, *args)

    original = DirectedTrainer.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DirectedTrainer, "log", keep)
        no_report(patch)
        pipeline.run(config(folder, out, **FEW, **RUNS[request.param]), quiet=True)
    return out


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


def test_the_last_step_is_the_policy_that_was_trained(run: Path, tmp_path: Path) -> None:
    result = replay(run, tmp_path / "out")
    assert (result["iteration"], result["step"], result["steps"], result["equal"]) == (1, STEPS, STEPS, True)
    trained, rebuilt = weights(run / "policy/001"), weights(tmp_path / "out")
    assert trained.keys() == rebuilt.keys()
    assert all(torch.equal(trained[name], rebuilt[name]) for name in trained)
    assert any(not torch.equal(rebuilt[name], tensor) for name, tensor in weights(run / "policy/000").items())
    assert result["journal_bytes"] == (run / "iterations/001/journal.jsonl").stat().st_size
    names = {path.name for path in (run / "policy/001").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names, "an ordinary folder like the trained one"


def test_any_step_in_between_is_the_one_that_was(run: Path, tmp_path: Path) -> None:
    replay(run, tmp_path / "out", to_step=2)
    rebuilt = weights(tmp_path / "out")
    found = sorted(run.parent.glob("*-2.pt"), key=lambda path: int(path.name.split("-")[0]))
    then = torch.load(found[-1])
    assert len(rebuilt) <= len(then)
    for name, tensor in then.items():
        saved = name.replace(".default.", ".")
        assert torch.equal(rebuilt[saved], tensor), name
    replay(run, tmp_path / "start", to_step=0)
    start = weights(run / "policy/000")
    assert all(torch.equal(tensor, start[name]) for name, tensor in weights(tmp_path / "start").items())


def test_a_finished_iteration_whose_journal_is_cut_off_is_refused(run: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(run, cut)
    journal = cut / "iterations/001/journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    with pytest.raises(InputError, match=rf"its last line is cut off, .*: --to-step {STEPS - 1}\.$"):
        replay(cut, tmp_path / "out")
    assert replay(cut, tmp_path / "out", to_step=STEPS - 1)["step"] == STEPS - 1


def test_the_journal_has_the_rows_and_rewards_of_every_step(run: Path) -> None:
    journal = read(run / "iterations/001/journal.jsonl")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if line["stage"] == "policy" and line["iteration"] == 1 and line["step"]]
    assert [step.reward for step in journal.steps] == [line["reward"] for line in logged]
    for step, line in zip(journal.steps, logged, strict=True):
        assert step.record.projected_gradient == line.get("projected_gradient", step.record.projected_gradient)
        assert step.record.eps[0] == line.get("eps", line.get("sigma"))
    used = [row for step in journal.steps for row in step.rows]
    assert len(set(used)) == len(used) == 2 * STEPS and set(used) <= set(range(1, len(rows()) + 1))


@pytest.fixture(scope="module")
def one(finished: tuple[RunConfig, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run that all files here share."""
    run = tmp_path_factory.mktemp("one") / "run"
    shutil.copytree(finished[0].output_dir, run)
    return run


def test_as_a_user_types_it(one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["replay", str(one), "--iteration", "1", "--out", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["equal"] is True
    assert cli.main(["replay", str(one), "--to-step", "1", "--out", str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert "after step 1 of 2" in out and "journal" in out and "equal" not in out
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(settings["base_model_name_or_path"])
    model = PeftModel.from_pretrained(base, str(tmp_path / "a"))
    assert "default" in model.peft_config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--iteration", "0"],
            "--iteration: must be a zeroth-order one, .* got iteration 0 of .* (iterations with",
        ),
        (["--iteration", "7"], "--iteration: must be a zeroth-order one"),
        (["--to-step", "3"], "--to-step: must lie in [0, 2], the journal's steps, got 3."),
        (["--to-step", "-1"], "--to-step: must lie in [0, 2]"),
    ],
)
def test_bad_input_is_one_line(
    one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["replay", str(one), "--out", str(tmp_path / "out"), *words]) == 2
    err = capsys.readouterr().err
    pattern = re.escape(message).replace(re.escape(".*"), ".*")
    assert re.search(pattern, err) and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_read_only_gives_a_folder_that_is_not(one: Path, tmp_path: Path) -> None:
    with read_only(one):
        assert replay(one, tmp_path / "out")["equal"] is True
    assert not closed(tmp_path / "out")
    (one / "policy/000/more").mkdir()
    (one / "policy/000/more/notes.txt").write_text("kept")
    replay(one, tmp_path / "again", to_step=1)
    assert (tmp_path / "again/more/notes.txt").read_text() == "kept"


def test_what_has_changed_is_refused(one: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(one, run)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(InputError, match="--out: must be a new or empty folder"):
        replay(run, tmp_path / "full")
    with pytest.raises(InputError, match="RUN: must be a run directory"):
        replay(tmp_path, tmp_path / "out")
    shutil.copy(run / "reward/000/adapter_model.safetensors", run / "reward/001/adapter_model.safetensors")
    with pytest.raises(InputError, match=r"'reward/001/adapter_model.safetensors' has changed"):
        replay(run, tmp_path / "out")
    shutil.rmtree(run / "policy/000")
    with pytest.raises(InputError, match=r"must hold 'policy/000/adapter_model.safetensors'"):
        replay(run, tmp_path / "out")
