"""Runs whose model llama.cpp runs: no network in PyTorch, and all that a run can do otherwise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import served_runs
from one_run import no_report
from served_runs import model_and_rows
from tiny_runs import fingerprint
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.export import export
from zopro.loop.replay import replay
from zopro.loop.voices import answer
from zopro.train.es import ESTrainer
from zopro.weights.adapters import adapter_state

pytest.importorskip("xllamacpp", reason="needs zopro[llamacpp]")
pytest.importorskip("gguf", reason="writes the test's GGUF files")

from tiny_gguf import write_gguf
from zopro.engine.servers.llamacpp import published


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.gguf, the same model for transformers in model/, and rows.jsonl."""
    folder = tmp_path_factory.mktemp("inputs")
    model, tokenizer = model_and_rows(folder)
    write_gguf(folder / "model.gguf", model, tokenizer, "llama")
    model.save_pretrained(folder / "model")
    return folder


def settings(folder: Path, out: Path, **options: Any) -> RunConfig:
    mine: dict[str, Any] = {
        "engine": f"llamacpp:{folder / 'model.gguf'}", "max_prompt_length": 48, "max_completion_length": 6,
        "iterations": 2, "policy_steps": 2, "eval_prompts": 4,
    }  # fmt: skip
    return served_runs.settings(folder, out, **{**mine, **options})


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        yield


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    pipeline.run(settings(folder, out), quiet=True)
    return out


def test_a_run_moves_its_adapter_and_measures_it(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert {"sft", "000", "001"} <= {path.name for path in (*run.glob("policy/*"), run / "sft")}
    assert [line["iteration"] for line in summary["evaluations"]] == [None, 0, 1]
    start, end = (adapter_state(run / name) for name in ("sft", "policy/001"))
    assert all((end[name] - start[name]).abs().max() > 0 for name in start)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(run: Path, folder: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", 0
    original = ESTrainer.training_step

    def killed(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:  # the second step of the second iteration
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ESTrainer, "training_step", killed)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(settings(folder, out), quiet=True)
    pipeline.run(settings(folder, out), resume=True, quiet=True)
    assert fingerprint(out) == fingerprint(run)


def test_a_journal_gives_back_the_adapter_without_an_engine(run: Path, folder: Path, tmp_path: Path) -> None:
    hidden = folder / "model.gguf"
    hidden.rename(folder / "away.gguf")
    try:
        replay(run, iteration=1, out=tmp_path / "again")
    finally:
        (folder / "away.gguf").rename(hidden)
    again, first = tmp_path / "again" / "adapter_model.safetensors", run / "policy" / "001" / "adapter_model.safetensors"
    assert again.read_bytes() == first.read_bytes()


def test_an_exported_adapter_is_the_same_policy_in_transformers_and_in_llama_cpp(
    run: Path, folder: Path, tmp_path: Path
) -> None:
    from zopro.engine import Batch
    from zopro.engine.opening import logprobs
    from zopro.engine.servers.llamacpp.engine import LlamaCppEngine
    from zopro.engine.servers.llamacpp.model import Model
    from zopro.zo import Gaussian, Weights

    export(run, tmp_path / "out", gguf=True)
    policy = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), tmp_path / "out").eval()
    ids = torch.randint(3, 260, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.ones_like(ids), 6)
    wanted = logprobs(policy, batch, 1.0)
    with policy.disable_adapter():
        assert (logprobs(policy, batch, 1.0) - wanted).abs().max() > 1e-3
    engine = LlamaCppEngine(Model(folder / "model.gguf", threads=1), Weights.of([], Gaussian()), 1.0)
    data = (tmp_path / "out" / "adapter.gguf").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "adapter_file", lambda at: data)
        torch.testing.assert_close(engine.logprobs(batch)[0], wanted, atol=2e-5, rtol=0)


def test_an_adapter_whose_names_are_not_known_says_that_it_is_for_llama_cpp(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "AS_LLAMA", frozenset())
        export(run, tmp_path / "out", gguf=True)
    text = (tmp_path / "out/README.md").read_text()
    assert "With llama.cpp alone" in text and "llama-cli -m" in text and "AutoPeftModel" not in text
    assert (tmp_path / "out/adapter.gguf").is_file()
    export(run, tmp_path / "known")
    assert "AutoPeftModel" in (tmp_path / "known/README.md").read_text()


def test_policies_answer_side_by_side(run: Path) -> None:
    (row,) = answer(run, ["tea or cake?"], max_new_tokens=6)["answers"]
    assert row["base"] == row["sft"] and row.keys() == {"prompt", "base", "sft", "aligned"}


def test_log_probs_and_the_reference_policy_come_from_llama_cpp_too(folder: Path, tmp_path: Path) -> None:
    mine = {"method": "mezo", "beta": 0.1, "eps": 0.01, "iterations": 1, "lora_freeze_a": True}
    pipeline.run(settings(folder, tmp_path / "run", **mine), quiet=True)
    journal = [json.loads(line) for line in (tmp_path / "run/iterations/000/journal.jsonl").read_text().splitlines()]
    assert any(line.get("projected_gradients", [0])[0] for line in journal)


def test_what_needs_the_network_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    for options, what in (
        ({"method": "guided"}, "method: must be one of .*es.* with engine llamacpp, got 'guided'"),
        ({"method": "rloo"}, "method: must be one of"),
        ({"reward": "model"}, "reward: must be rewards that this run does not train"),
        ({"sft_steps": 3}, "sft_steps: must be 0"),
        ({"lora_r": 0}, "lora_r: must be greater than 0"),
        ({"method": "zopro", "warm_start": "first_order"}, "warm_start: must be one of sft, spsa, fzoo, es, es-paper"),
        ({"method": "zopro", "warm_start": "guided"}, "warm_start: must be one of sft, spsa"),
        ({"engine": "llamacpp"}, "engine: must be one of transformers, llamacpp:FILE"),
        ({"engine": "llamacpp:blobs/sha256"}, r"engine: must be llamacpp:FILE\.gguf, got 'llamacpp:blobs/sha256'"),
        ({"engine": "transformers", "model": "a.gguf"}, r"model: must be a Hub id .* Set engine: llamacpp:a\.gguf"),
    ):
        with pytest.raises(InputError, match=what):
            settings(folder, tmp_path, **options)
    with pytest.raises(InputError, match=r"engine: must be given a GGUF file, got 'none\.gguf'"):
        pipeline.run(settings(folder, tmp_path / "run", engine="llamacpp:none.gguf"), quiet=True)


def test_no_weights_are_merged_that_are_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--merged: must not be given, engine llamacpp"):
        export(run, tmp_path / "out", merged=True)
