"""What a vLLM server may get wrong while it says that all is well, and how its client tells."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import tiny_model, tiny_tokenizer
from vllm_server import Refused, VLLMServer
from zopro.engine import Sampling
from zopro.engine.servers.vllm.client import Failed, Server
from zopro.engine.servers.vllm.publishing import Published


@pytest.fixture(scope="module")
def model_and_tokenizer() -> tuple[Any, Any]:
    tokenizer = tiny_tokenizer(["tea or cake, please"])
    return tiny_model("llama", tokenizer), tokenizer


@pytest.fixture
def there(model_and_tokenizer: tuple[Any, Any]) -> Iterator[VLLMServer]:
    yield (server := VLLMServer(*model_and_tokenizer))
    server.close()


@pytest.fixture
def server(there: VLLMServer) -> Server:
    client = Server(there.url, timeout=10)
    client.greet()
    return client


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}},
            "length 1, not 4: an answer ends with its first stop or after max_tokens",
        ),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "length 0, not 4"),
        ({"token_ids": ["5", "2"], "logprobs": {"token_logprobs": [-1.0, -1.0]}}, "TypeError"),
        ({"token_ids": [5, 2], "logprobs": {"token_logprobs": [-1.0]}}, "2 tokens with 1 log-probs"),
        ({"token_ids": [2, 5, 2], "logprobs": {"token_logprobs": [-1.0] * 3}}, "length 3, not 1"),
        ({"token_ids": [5] * 5, "logprobs": {"token_logprobs": [-1.0] * 5}}, "length 5, not 4"),
        ({"token_ids": [-5, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}}, "token -5 of a vocabulary of 50"),
        ({"token_ids": [10**30, 2], "logprobs": {"token_logprobs": [-1.0, -1.0]}}, "token 10{30} of a vocabulary of 50"),
        ({"token_ids": [2], "logprobs": {"token_logprobs": [0.5]}}, "a log-prob of 0.5"),
        ({"token_ids": [2], "logprobs": {"token_logprobs": ["-1.0"]}}, "a log-prob of '-1.0'"),
        ({"token_ids": [2], "logprobs": {"token_logprobs": [-(10**400)]}}, "a log-prob of -1000"),
    ],
    ids=[
        *("aborted", "empty", "text", "a log-prob lacks", "on after its end", "too long", "below 0", "no 64 bits"),
        *("likelier than 1", "a text", "beyond all"),
    ],
)
def test_an_answer_that_is_none_is_the_servers_failure(
    change: dict[str, Any], why: str, there: VLLMServer, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = there.complete
    monkeypatch.setattr(there, "complete", lambda *args: complete(*args) | change)
    server.vocabulary = 50
    with pytest.raises(Failed, match=why):
        server.sample("base", [[3, 4]], [0], Sampling(4, [2], 0))


def test_a_server_without_room_for_adapters_is_tried_with_one(
    there: VLLMServer, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = there.answer
    monkeypatch.setattr(there, "answer", lambda path, body: 'max_lora="0"' if path == "/metrics" else answer(path, body))
    server.greet()
    assert server.slots == 1


def test_answers_that_end_or_are_as_long_as_asked_for_are_whole(there: VLLMServer, server: Server) -> None:
    ((first, _),) = server.sample("base", [[3, 4]], [0], Sampling(4, [], 0, do_sample=False))
    assert len(first) == 4
    ((ended, _),) = server.sample("base", [[3, 4]], [0], Sampling(4, [first[0]], 0, do_sample=False))
    assert ended == first[:1]


@pytest.mark.parametrize("hidden", ["", "/tokenize"], ids=["all seen", "behind what lets /v1 through alone"])
def test_a_server_that_returns_with_other_weights_stays_left_out(there: VLLMServer, hidden: str) -> None:
    def refuse(path: str, body: Any) -> None:
        if path == hidden:
            raise Refused(404, None)

    there.tampers = refuse
    server = Server(there.url, timeout=10)
    for _ in range(2):
        server.greet()
    there.model = copy.deepcopy(there.model)
    with torch.no_grad():
        for weight in there.model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=1.0)
    with pytest.raises(Failed, match="its weights are not those of before: log-probs differ by"):
        server.greet()


def test_modules_of_other_ranks_keep_their_scale(there: VLLMServer, server: Server, tmp_path: Path) -> None:
    """The server has one factor for an adapter, alpha over its rank; PEFT has one for each module."""
    tensors, wanted, draw = dict[str, torch.Tensor](), dict[str, torch.Tensor](), torch.Generator().manual_seed(1)
    for rank, module in ((1, "q_proj"), (3, "k_proj")):
        name = f"model.layers.0.self_attn.{module}"
        weight = there.model.get_parameter(f"{name}.weight")
        a = tensors[f"{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=draw)
        b = tensors[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=draw)
        wanted[f"{name}.weight"] = weight + 6.0 / rank * b @ a
    with Published(str(tmp_path)) as published:
        server.load("zopro-1", published.write(tensors, alpha=6.0))
    for name, weight in wanted.items():
        torch.testing.assert_close(there.adapters["zopro-1"].get_parameter(name), weight)


def test_what_was_not_unloaded_is_so_later(there: VLLMServer, server: Server, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.weight"
    shape = there.model.get_parameter("model.layers.0.self_attn.q_proj.weight").shape
    tensors = {name: torch.zeros(1, shape[1]), name.replace("_A", "_B"): torch.zeros(shape[0], 1)}

    def busy(path: str, body: Any) -> None:
        if path == "/v1/unload_lora_adapter":
            raise Refused(500, "busy")

    with Published(str(tmp_path)) as published:
        for number in (1, 2):
            server.load(f"zopro-{number}", published.write(tensors, 1.0))
        there.tampers = busy
        server.unload("zopro-1")
        server.unload("zopro-1")
        assert there.adapters.keys() == {"zopro-1", "zopro-2"}
        there.tampers = lambda path, body: None
        server.load("zopro-3", published.write(tensors, 1.0))
        assert there.adapters.keys() == {"zopro-2", "zopro-3"}
        server.unload("zopro-0")  # which it does not have
        server.greet()  # as after a restart: nothing of before is wanted
        assert not there.adapters
