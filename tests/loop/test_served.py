"""What a run keeps of its engine, and how it knows the engine's model again."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from served_runs import model_and_rows, settings
from tiny_runs import NAMES
from vllm_server import Refused, VLLMServer
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.opening import open_all

TEMPLATE = "{% for m in messages %}DAY {{ m['role'] }}: {{ m['content'] }}<eos>{% endfor %}"


class Inputs:
    """A run that was begun on another day than it is resumed on: its chat template writes the date."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        self.model, self.tokenizer = model_and_rows(folder)
        self.model.config.save_pretrained(folder / "model")
        self.servers: list[VLLMServer] = []
        self.day("monday")
        self.first = self.server(self.model)
        open_all(self.config(self.first))

    def day(self, name: str) -> None:
        self.tokenizer.chat_template = TEMPLATE.replace("DAY", NAMES[len(name) % len(NAMES)])
        self.tokenizer.save_pretrained(self.folder / "model")

    def server(self, model: Any) -> VLLMServer:
        self.servers.append(VLLMServer(model, self.tokenizer))
        return self.servers[-1]

    def config(self, server: VLLMServer) -> RunConfig:
        return settings(
            self.folder, self.out, engine=f"vllm:{server.url}", model=str(self.folder / "model"), max_prompt_length=80,
            max_completion_length=5, eval_prompts=2,
        )  # fmt: skip

    @property
    def record(self) -> Path:
        return self.out / "engine.json"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inputs]:
    yield (made := Inputs(tmp_path_factory.mktemp("inputs")))
    for server in made.servers:
        server.close()


def test_other_weights_are_refused_on_another_day_too(inputs: Inputs) -> None:
    other = copy.deepcopy(inputs.model)
    with torch.no_grad():
        other.lm_head.weight.mul_(20.0)
    kept = inputs.record.read_text()
    inputs.day("tuesday's")
    _, models, _ = open_all(inputs.config(inputs.first), resume=True)
    assert models.said is not None and models.said["tokens"] == json.loads(kept)["tokens"]
    with pytest.raises(InputError, match=r"engine: must hold the model that the run began with, .* differ by \d"):
        open_all(inputs.config(inputs.server(other)), resume=True)
    assert inputs.record.read_text() == kept


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"tokens": [], "logprobs": []},
        {"tokens": [[5]], "logprobs": [[]]},
        {"tokens": [[5, 6]], "logprobs": [[-1.0, -2.0]]},
        {"tokens": [[5, -6]], "logprobs": [[-1.0]]},
        {"tokens": [[5, 6]], "logprobs": [["x"]]},
        {"tokens": [[5, 6], [7, 8]], "logprobs": [[-1.0]]},
    ],
    ids=str,
)
def test_a_damaged_record_is_named(inputs: Inputs, damaged: Any) -> None:
    whole = inputs.record.read_text()
    inputs.record.write_text(json.dumps(damaged))
    try:
        with pytest.raises(InputError, match=r"engine\.json': must hold tokens and logprobs, and is damaged"):
            open_all(inputs.config(inputs.first), resume=True)
    finally:
        inputs.record.write_text(whole)


def test_tokens_that_the_model_does_not_have_are_another_models(inputs: Inputs) -> None:
    whole = inputs.record.read_text()
    inputs.record.write_text(json.dumps({"tokens": [[5, 100_000]], "logprobs": [[-1.0]], "exact": False}))
    try:
        with pytest.raises(InputError, match=r"must hold the model that the run began with, got one whose vocabulary"):
            open_all(inputs.config(inputs.first), resume=True)
    finally:
        inputs.record.write_text(whole)


def test_what_hides_the_servers_tokenizer_is_remarked_and_refuses_nothing(inputs: Inputs, tmp_path: Path) -> None:
    """A proxy that lets /v1 through alone."""
    server = inputs.server(inputs.model)

    def hides(path: str, body: Any) -> None:
        if path == "/tokenize":
            raise Refused(404, None)

    server.tampers = hides
    _, models, _ = open_all(inputs.config(server), resume=True)
    assert f"engine: {server.url} lets no /tokenize through" in "\n".join(models.remarks())
