"""Runs whose model vLLM servers run: two that share steps, one of them killed, and all that a run can do otherwise."""

from __future__ import annotations

import copy
import gc
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from one_run import no_report
from served_runs import model_and_rows, settings
from served_starts import Starts
from tiny_runs import fingerprint
from vllm_server import VLLMServer
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.export import export
from zopro.loop.replay import replay
from zopro.loop.voices import answer
from zopro.weights.adapters import adapter_state


class Inputs:
    """A model's configuration and tokenizer without its weights, rows, and servers that have the weights."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.tokenizer = model_and_rows(folder)
        self.model.config.save_pretrained(folder / "model")
        self.tokenizer.save_pretrained(folder / "model")
        self.servers: list[VLLMServer] = []

    def server(self) -> VLLMServer:
        self.servers.append(VLLMServer(self.model, self.tokenizer))
        return self.servers[-1]

    def settings(self, out: Path, *servers: VLLMServer, **options: Any) -> RunConfig:
        mine: dict[str, Any] = {
            "engine": f"vllm:{','.join(server.url for server in servers)}", "model": str(self.folder / "model"),
            "max_prompt_length": 80, "max_completion_length": 5, "iterations": 1, "policy_steps": 3, "eval_prompts": 2,
        }  # fmt: skip
        return settings(self.folder, out, **{**mine, **options})


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        yield


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    yield (made := Inputs(tmp_path_factory.mktemp("inputs")))
    for server in made.servers:
        server.close()


@pytest.fixture(scope="module")
def starts(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starts]:
    with pytest.MonkeyPatch.context() as patch:
        yield Starts(tmp_path_factory.mktemp("python"), patch, inputs.server().url)


@pytest.fixture(scope="module")
def run(inputs: Inputs, starts: Starts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By a server that is started for it; others name theirs."""
    out = tmp_path_factory.mktemp("run") / "run"
    pipeline.run(inputs.settings(out, engine="vllm", vllm_flags="--seed 3"), quiet=True)
    return out


def test_a_run_moves_its_adapter_and_measures_it(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert [line["iteration"] for line in summary["evaluations"]] == [None, 0]
    assert all(line["reward"] > 0 and line["kl_per_answer"] is not None for line in summary["evaluations"])
    start, end = (adapter_state(run / name) for name in ("sft", "policy/000"))
    assert all((end[name] - start[name]).abs().max() > 0 for name in start)


def test_the_server_that_was_started_is_told_what_it_needs_and_gone_at_the_end(
    run: Path, inputs: Inputs, starts: Starts
) -> None:
    (noted,) = starts.noted()
    told = " ".join(noted["arguments"])
    assert f"--model {inputs.folder / 'model'} " in told and "--max-lora-rank 8 " in told
    assert "--lora-target-modules q_proj k_proj v_proj o_proj gate_proj up_proj down_proj --uvicorn" in told
    assert told.endswith("--enforce-eager --no-enable-prefix-caching --no-enable-chunked-prefill --seed 3")
    assert starts.gone()


def test_a_server_killed_in_a_step_costs_its_share_and_changes_nothing(
    run: Path, inputs: Inputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed, other = inputs.server(), inputs.server()
    steps: list[int] = []

    def kill(path: str, body: Any) -> None:
        if path == "/v1/load_lora_adapter" and (tmp_path / "run" / "iterations").is_dir():
            steps.append(len((tmp_path / "run" / "iterations/000/journal.jsonl").read_text().splitlines()))
        if steps and steps[-1] >= 2:  # a header, and the first step's record: in the middle of the second
            raise ConnectionResetError

    killed.tampers = kill
    with caplog.at_level(logging.WARNING):
        pipeline.run(inputs.settings(tmp_path / "run", killed, other), quiet=True)
    assert steps and f"engine: {killed.url} is left out" in caplog.text
    assert fingerprint(tmp_path / "run") == fingerprint(run)


def test_a_run_goes_on_at_another_server_where_all_had_gone(run: Path, inputs: Inputs, tmp_path: Path) -> None:
    first, second = inputs.server(), inputs.server()
    journal = tmp_path / "run" / "iterations/000/journal.jsonl"

    def gone(path: str, body: Any) -> None:
        if journal.is_file() and len(journal.read_text().splitlines()) >= 3:
            raise ConnectionResetError

    first.tampers = gone
    with pytest.raises(InputError, match=rf"at least one server must answer, got {first.url}.* with --resume"):
        pipeline.run(inputs.settings(tmp_path / "run", first), quiet=True)
    other = inputs.server()
    other.model = copy.deepcopy(inputs.model)
    with torch.no_grad():
        other.model.lm_head.weight.mul_(20.0)
    before = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(
        InputError, match=r"engine: must hold the model that the run began with, got one whose log-probs differ by \d"
    ):
        pipeline.run(inputs.settings(tmp_path / "run", other), resume=True, quiet=True)
    assert (tmp_path / "run" / "config.yaml").read_text() == before
    pipeline.run(inputs.settings(tmp_path / "run", second), resume=True, quiet=True)
    assert fingerprint(tmp_path / "run") == fingerprint(run)
    assert answer(tmp_path / "run", ["tea?"], max_new_tokens=2)["answers"], "of the server that it has now"


def test_a_journal_gives_back_the_adapter_without_a_server(run: Path, tmp_path: Path) -> None:
    replay(run, iteration=0, out=tmp_path / "again")
    again, first = tmp_path / "again" / "adapter_model.safetensors", run / "policy" / "000" / "adapter_model.safetensors"
    assert again.read_bytes() == first.read_bytes()


def test_policies_answer_side_by_side_through_the_server(run: Path, inputs: Inputs, starts: Starts) -> None:
    server = inputs.servers[0]
    before = len(server.sampled)
    (row,) = answer(run, ["tea or cake?"], max_new_tokens=6, temperature=0.5)["answers"]
    assert row["base"] == row["sft"] and row.keys() == {"prompt", "base", "sft", "aligned"}
    assert server.sampled[before:].count("base") >= 1 and len(set(server.sampled[before:])) == 3
    gc.collect()
    assert len(starts.noted()) == 2 and starts.gone()  # a process that goes on does not keep it


def test_an_exported_adapter_is_peft_and_gguf(run: Path, inputs: Inputs, tmp_path: Path) -> None:
    export(run, tmp_path / "out", gguf=True)
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["base_model_name_or_path"].endswith("model")
    assert (tmp_path / "out/adapter.gguf").read_bytes()[:4] == b"GGUF"
    with pytest.raises(InputError, match="--merged: must not be given, engine vllm"):
        export(run, tmp_path / "merged", merged=True)


def test_log_probs_and_the_reference_policy_come_from_the_server_too(inputs: Inputs, tmp_path: Path) -> None:
    mine = {"method": "zopro", "beta": 0.1, "eps": 0.01, "policy_steps": 1, "eval_prompts": 1}
    pipeline.run(inputs.settings(tmp_path / "run", inputs.servers[0], **mine), quiet=True)
    lines = (tmp_path / "run/iterations/000/journal.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("projected_gradients", [0])[0] for line in lines)


def test_what_the_servers_cannot_do_is_refused_before_anything_is_loaded(inputs: Inputs, tmp_path: Path) -> None:
    for options, what in (
        ({"method": "guided"}, "method: must be one of .*es.* with engine vllm, got 'guided'"),
        ({"method": "rloo"}, "method: must be one of"),
        ({"temperature": 0.7}, "temperature: must be 1 with engine vllm, .* got 0.7"),
        ({"sft_steps": 3}, "sft_steps: must be 0"),
        ({"engine_timeout": 0}, "engine_timeout: must be greater than 0"),
        ({"engine": "vllm:"}, "engine: must be one of transformers, .*vllm:URLS"),
    ):
        with pytest.raises(InputError, match=what):
            inputs.settings(tmp_path, inputs.servers[0], **options)
    with pytest.raises(InputError, match=r"every server must answer at the start, got http://127\.0\.0\.1:9: Connection"):
        pipeline.run(inputs.settings(tmp_path / "run", engine="vllm:http://127.0.0.1:9"), quiet=True)
    assert not (tmp_path / "run").exists()
