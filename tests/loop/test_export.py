"""Exported policies answer as they did in the run, in the libraries that everybody has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

import zopro
from archived import closed, read_only
from tiny import tiny_model, tiny_tokenizer
from tiny_finished import finished_run, greedy, policy, save_adapter, write_config
from zopro import cli
from zopro.errors import InputError
from zopro.loop.export import export
from zopro.loop.finished import find_policy
from zopro.loop.voices import answer, side_by_side
from zopro.weights.adapters import tensor_files
from zopro.weights.saving import save_weights

PROMPTS = ["what is a good day", "red"]
IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def full_run(run) -> Path:
    """A full-parameter run: its policies are models."""
    folder = run.parent / "full"
    for part, source in (("sft", "sft"), ("policy/000", "policy/001")):
        policy(run, source).merge_and_unload().save_pretrained(folder / part)
    write_config(folder, model=str(run.parent / "base"), lora_r=0)
    return folder


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize(("iteration", "part"), [(None, "policy/001"), (0, "policy/000")])
def test_an_adapter_loads_in_peft_from_anywhere(run, tmp_path, monkeypatch, iteration, part):
    written = export(run, tmp_path / "out", iteration=iteration)
    assert written["kind"] == "adapter" and written["iteration"] == int(part[-3:])
    monkeypatch.chdir("/")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(logits(model), logits(policy(run, part)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<eos>" and tokenizer.chat_template


def test_a_base_named_by_a_relative_path_is_found(run, tmp_path, monkeypatch):
    relative = run.parent / "relative"
    save_adapter(run.parent / "base", relative / "policy" / "000")
    write_config(relative, model="base")
    monkeypatch.chdir(run.parent)
    export("relative", tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(run.parent / "base")


def test_a_merged_model_is_an_ordinary_model(run, tmp_path):
    assert export(run, tmp_path / "out", merged=True)["kind"] == "model"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(model), logits(policy(run, "policy/001")), atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert not list(tmp_path.rglob("adapter*")) and not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("merged", [False, True])
def test_a_full_parameter_policy_is_copied(full_run, tmp_path, merged):
    assert export(full_run, tmp_path / "out", merged=merged)["kind"] == "model"
    expected = AutoModelForCausalLM.from_pretrained(full_run / "policy" / "000")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(expected))
    AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("which", ["run", "full_run"])
def test_a_run_that_is_read_only_gives_a_folder_that_is_not(which, request, tmp_path):
    folder = request.getfixturevalue(which)
    with read_only(folder):
        export(folder, tmp_path / "out")
    assert not closed(tmp_path / "out")


def test_a_full_parameter_policy_has_the_names_that_others_know(tmp_path):
    """Pythia's head, which transformers renames as it loads the model."""
    tokenizer = tiny_tokenizer()
    model, run = tiny_model("gpt_neox", tokenizer), tmp_path / "run"
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    save_weights(model, run / "policy" / "000")
    model.save_pretrained(run / "policy" / "001")  # as a run of 0.1.0 has it
    write_config(run, model=str(tmp_path / "base"), lora_r=0)
    assert set(tensor_files(run / "policy" / "000")) != set(tensor_files(tmp_path / "base"))
    for iteration, out in ((0, tmp_path / "out"), (1, tmp_path / "older")):
        export(run, out, iteration=iteration)
        assert set(tensor_files(out)) == set(tensor_files(tmp_path / "base"))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(model))


def test_answers_are_those_of_the_three_models(run):
    answers = answer(run, PROMPTS)
    assert answers["iteration"] == 1
    for row, prompt in zip(answers["answers"], PROMPTS, strict=True):
        assert row["prompt"] == prompt
        assert row["base"] == greedy(run, AutoModelForCausalLM.from_pretrained(run.parent / "base"), prompt)
        assert row["sft"] == greedy(run, policy(run, "sft"), prompt)
        assert row["aligned"] == greedy(run, policy(run, "policy/001"), prompt)
    assert any(len({row["base"], row["sft"], row["aligned"]}) == 3 for row in answers["answers"])


def test_full_parameter_runs_answer_alike(run, full_run):
    adapters, whole = (answer(folder, PROMPTS)["answers"] for folder in (run, full_run))
    assert adapters == whole


def test_a_run_without_sft_starts_from_the_base(run, tmp_path):
    save_adapter(run.parent / "base", tmp_path / "policy" / "000")
    write_config(tmp_path, model=str(run.parent / "base"), sft_steps=0)
    (row,) = answer(tmp_path, ["red"])["answers"]
    assert row["sft"] == row["base"]


def test_sampling_is_repeated_by_its_seed_and_leaves_the_global_state(run):
    state = torch.get_rng_state()
    first, again, other = (answer(run, PROMPTS, temperature=1.5, seed=seed)["answers"] for seed in (0, 0, 1))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_commands_as_typed(run, tmp_path, capsys):
    assert (
        cli.main(["generate", str(run), "--prompt", *PROMPTS, "--iteration", "0", "--max-new-tokens", "3", "--json"]) == 0
    )
    printed = json.loads(capsys.readouterr().out)
    assert [row["prompt"] for row in printed["answers"]] == PROMPTS
    assert all(len(row["aligned"].split()) <= 3 for row in printed["answers"])
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"adapter of iteration 1 written to {tmp_path / 'out'}\n"


def test_an_unfinished_policy_is_not_taken(run):
    assert find_policy(run).iteration == 1
    with pytest.raises(InputError, match="must be one of 0, 1, got 2"):
        find_policy(run, 2)


def test_bad_input_is_refused_before_anything_is_written(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    with pytest.raises(InputError, match=r"--out: must be a new or empty folder"):
        export(run, tmp_path / "full")
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "precious.txt"]
    with pytest.raises(InputError, match=r"got '.*precious.txt' \(a file\). Choose another."):
        export(run, tmp_path / "full/precious.txt")
    with pytest.raises(InputError, match=r"no config\.yaml in it"):
        export(tmp_path / "absent", tmp_path / "out")
    write_config(tmp_path / "young", model="m")
    with pytest.raises(InputError, match="none yet"):
        find_policy(tmp_path / "young")
    with pytest.raises(InputError, match="--max-new-tokens: must be at least 1, got 0"):
        answer(run, ["red"], max_new_tokens=0)
    with pytest.raises(InputError, match="--temperature: must not be negative"):
        answer(run, ["red"], temperature=-1.0)


def test_a_base_that_is_away_is_refused_by_name_and_the_numbers_can_be_read(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    write_config(tmp_path / "run", model="./bases/mine")
    with pytest.raises(InputError, match=r"^model: .*got './bases/mine'.* in '.*config\.yaml': correct it there, or go"):
        find_policy(tmp_path / "run")
    assert zopro.load(tmp_path / "run").metrics == []


def test_answers_stand_side_by_side():
    answers = {
        "iteration": 2,
        "answers": [{"prompt": "p", "base": "one two " * 9, "sft": "s", "aligned": "\x1b[31mred"}],
    }
    wide = side_by_side(answers, 100).splitlines()
    assert wide[0] == "> p"
    assert wide[1].split("  ")[0] == "base" and wide[1].endswith("aligned (iteration 2)")
    assert "s" in wide[3] and wide[3].endswith("[31mred") and "\x1b" not in "".join(wide)
    assert all(len(line) <= 100 for line in wide)
    assert side_by_side(answers, 40).splitlines()[-1] == "aligned (iteration 2): [31mred"
    answers = {
        "iteration": 2,
        "sft_steps": 0,
        "answers": [{"prompt": "p", "base": "b", "sft": "s", "aligned": "red " * 5}],
    }
    assert side_by_side(answers, 40).splitlines()[2:] == ["start: s", "broken (iteration 2): red red red red", "  red"]
