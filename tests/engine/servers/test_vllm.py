"""vLLM over HTTP against transformers' forward pass of the same weights: a recorded server, and a real one if named.

    ZOPRO_VLLM=http://127.0.0.1:8000 ZOPRO_VLLM_MODEL=DIR pytest tests/engine/servers/test_vllm.py

`benchmarks/real_engines.py` starts real servers for this, and stops them.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from served_policies import PROMPTS, batch, check_slope, displacements, picked, trained, true_logprobs
from tiny import tiny_model, tiny_tokenizer
from vllm_server import VLLMServer
from zopro.config.model import ModelOptions
from zopro.engine import Batch, Sampling
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.targets import new_adapter
from zopro.engine.opening import open_base, served
from zopro.engine.servers.adapters import shared_folder
from zopro.engine.servers.check import check_engine
from zopro.engine.servers.vllm.client import Server
from zopro.engine.servers.vllm.engine import VLLMEngine
from zopro.engine.servers.vllm.publishing import tidy
from zopro.errors import InputError
from zopro.system.random_state import preserve_random_state
from zopro.zo import Gaussian, StepRecord, Weights

AT = displacements(0.02)
PLUS = AT[1]
ROUNDING = 5e-4  # nats, of fp32 sums in another order; of 30 layers after a displacement
KEY = "sk-secret-0123456789"


class Both:
    """A policy in transformers with PEFT, and the same one at a server."""

    def __init__(self, model: str, url: str, folder: str, server: VLLMServer | None) -> None:
        self.server, self.folder, self.model, self.url = server, folder, model, url
        self.options = ModelOptions(
            model=model, engine=f"vllm:{url}", dtype="float32", adapter_folder=folder, lora_r=4, lora_alpha=6
        )
        self.base = open_base(self.options, torch.device("cpu"))
        with preserve_random_state():
            torch.manual_seed(0)
            self.policy: Any = new_adapter(
                AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), self.options, "CAUSAL_LM"
            ).eval()
            for name, parameter in self.policy.named_parameters():
                if "lora_B" in name:
                    parameter.data.normal_(std=0.02)
            self.hollow: Any = new_adapter(self.base, self.options, "CAUSAL_LM").eval()
        theirs = dict(self.policy.named_parameters())
        for name, parameter in self.hollow.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(theirs[name])
        self.local = LocalEngine(self.policy, Weights.of(self.named(), Gaussian()))
        self.other: Any = served(self.hollow)

    def named(self) -> list[tuple[str, Tensor]]:
        return trained(self.policy)


@pytest.fixture(scope="module", params=["recorded", "real"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    folder = tmp_path_factory.mktemp("vllm")
    adapters = tempfile.mkdtemp(dir=shared_folder())
    if request.param == "real":
        url, model = os.environ.get("ZOPRO_VLLM"), os.environ.get("ZOPRO_VLLM_MODEL")
        if not (url and model):
            pytest.skip("needs a vLLM server: set ZOPRO_VLLM to its address and ZOPRO_VLLM_MODEL to the model's folder")
        yield Both(model, url, adapters, None)
        shutil.rmtree(adapters)
        return
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", tokenizer)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    server = VLLMServer(model, tokenizer)
    yield Both(str(folder / "model"), server.url, adapters, server)
    server.close()
    shutil.rmtree(adapters)


def options(**how: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 6, "eos_token_ids": [2], "pad_token_id": 0, **how})


def test_logprobs_are_those_of_transformers_at_every_displacement_and_theta_comes_back(both: Both) -> None:
    found = both.other.logprobs(batch(), [*AT, None])
    wanted = true_logprobs(both.policy, AT)
    for one, other in zip(found, [*wanted, wanted[0]], strict=True):
        torch.testing.assert_close(one, other, atol=ROUNDING, rtol=0)
    assert all((one - other).abs().max() > 100 * ROUNDING for one, other in pairwise(wanted))


def test_slopes_at_the_chosen_distance_are_autograds(both: Both) -> None:
    check_slope(both.other, both.policy)


def test_the_likeliest_tokens_are_transformers(both: Both) -> None:
    found = both.other.sample(PROMPTS, 2, options(do_sample=False), AT[:2])
    wanted = both.local.sample(PROMPTS, 2, options(do_sample=False), AT[:2])
    for one, other in zip(found, wanted, strict=True):
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=ROUNDING, rtol=0)


def test_the_same_seeds_draw_the_same_tokens_and_rows_have_their_own(both: Both) -> None:
    def draw() -> list[Any]:
        seeds = [torch.Generator().manual_seed(row) for row in range(8)]
        return list(both.other.sample(PROMPTS, 4, options(generator=seeds), [None, PLUS, None]))

    first, moved, again = draw()
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert torch.equal(first.completion_ids, draw()[0].completion_ids)
    assert not torch.equal(first.completion_ids, moved.completion_ids)
    assert len({tuple(row) for row in first.completion_ids[:4].tolist()}) > 1
    with torch.no_grad():
        scores = picked(both.policy, Batch.of(first))
    torch.testing.assert_close(first.logprobs, scores, atol=ROUNDING, rtol=0)


def test_answers_end_with_the_token_that_ends_them_and_temperature_hides_their_log_probs(both: Both) -> None:
    whole = both.other.sample(PROMPTS, 1, options(do_sample=False))[0]
    ends = int(whole.completion_ids[0, 2])
    cut = both.other.sample(PROMPTS, 1, options(do_sample=False, eos_token_ids=[ends]))[0]
    first = whole.completion_ids[0].tolist()
    assert cut.answers()[0] == first[: first.index(ends) + 1]
    assert both.other.sample(PROMPTS, 1, options(temperature=0.7))[0].logprobs.isnan().any()
    with pytest.raises(InputError, match=r"temperature: must be 1, at which vLLM gives log-probs .* got 0\.7"):
        both.other.logprobs(batch(), temperature=0.7)


def test_without_an_adapter_it_is_the_base(both: Both) -> None:
    found = VLLMEngine(both.base.served_by, Weights.of([], Gaussian()), 1.0).logprobs(batch())[0]
    with both.policy.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(found, picked(both.policy, batch()), atol=ROUNDING, rtol=0)


def test_a_record_moves_theta_as_it_moves_the_local_engine(both: Both) -> None:
    record = StepRecord(
        step=2, seed=4, projected_gradients=[0.5], coefficients=[0.5], learning_rates=[0.01], eps=[1e-3],
        weight_decay=[0.01], loss=1.0, signal_to_noise=1.0, skipped=False,
    )  # fmt: skip
    ours, theirs = ([(name, p.detach().clone()) for name, p in both.named()] for _ in range(2))
    moved = Weights.of(ours, Gaussian())
    moved.apply(record)
    engine = VLLMEngine(both.base.served_by, Weights.of(theirs, Gaussian()), 6.0, both.folder)
    engine.apply(record)
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(ours, theirs, strict=True))
    assert not torch.equal(engine.logprobs(batch())[0], both.other.logprobs(batch())[0])


def test_the_first_look_finds_nothing_wrong(both: Both) -> None:
    both.base.check_tokens(AutoTokenizer.from_pretrained(both.model), ["tea<eos>", "Zu spät: 3,5 Ü!\n\n  "])
    lines = check_engine(both.other, PROMPTS, options(), differences=both.server is None)
    print(*lines, sep="\n")
    assert lines[0].startswith("engine: theta repeats") and all("a slope stands" in line for line in lines[1:])


def test_nothing_is_left_behind(both: Both) -> None:
    server = both.base.served_by.servers[0]
    assert [card["id"] for card in server._ask("GET", "/v1/models")["data"]] == [server.base]
    assert not list(Path(both.folder).iterdir())
    old, new = (Path(both.folder) / f"zopro-{letter * 32}" for letter in "ab")
    for path in (old, new):
        path.mkdir()
    os.utime(old, (0, 0))
    tidy(both.folder)  # what a killed process left
    assert list(Path(both.folder).iterdir()) == [new]
    new.rmdir()


def test_the_network_is_not_here(both: Both) -> None:
    with pytest.raises(InputError, match="engine: vllm has no network in PyTorch"):
        both.hollow(torch.tensor([[1, 2]]))
    held = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in both.hollow.parameters()}
    assert sum(held.values()) < 1.1 * 4 * sum(p.numel() for _, p in both.named())
    assert {server.vocabulary for server in both.base.served_by.servers} == {both.base.config.vocab_size}


@pytest.fixture
def server(both: Both) -> Iterator[VLLMServer]:
    if both.server is None:
        pytest.skip("of a server that can be told to misbehave")
    server, kept = both.server, dict(vars(both.server))
    yield server
    for name in ("deaf", "key", "updating", "max_rank", "tampers", "context"):
        setattr(server, name, kept[name])


@pytest.mark.parametrize(
    ("knobs", "what"),
    [
        ({"deaf": ("k_proj", "o_proj")}, "heeded on all modules that have one, got none on k_proj, o_proj"),
        ({"max_rank": 2}, r"LoRA rank 4 is greater than max_lora_rank 2\.; start it with a --max-lora-rank of lora_r"),
        ({"updating": False}, r"says 404: .*; start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"key": KEY}, r"says 401: Unauthorized: None; export its key as VLLM_API_KEY"),
        ({"context": 7}, r"maximum context length is 7 tokens\.; start it with a larger --max-model-len"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(both: Both, server: VLLMServer, knobs: dict[str, Any], what: str) -> None:
    for name, value in knobs.items():
        setattr(server, name, value)
    with pytest.raises(InputError, match=what):
        check_engine(VLLMEngine(*_fresh(both)), PROMPTS, options(), differences=False)


def _fresh(both: Both) -> tuple[Any, Weights, float, str]:
    """A fleet whose server nobody has met."""
    fleet = copy.copy(both.base.served_by)
    fleet._absent, fleet._pauses = {}, {}
    return fleet, both.other.weights, 6.0, both.folder


def test_a_folder_that_the_server_does_not_see_is_named(both: Both, server: VLLMServer) -> None:
    server.tampers = lambda path, body: body and "lora_path" in body and body.update(lora_path="/elsewhere")
    with pytest.raises(InputError, match=r"No adapter found for /elsewhere; set adapter_folder to a folder"):
        VLLMEngine(*_fresh(both)).logprobs(batch())


def test_a_key_comes_from_the_environment_and_goes_nowhere_else(
    both: Both, server: VLLMServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = "another"
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    with pytest.raises(InputError) as failed:
        open_base(both.options, torch.device("cpu"))
    assert "Unauthorized: Bearer [redacted]" in str(failed.value) and KEY not in str(failed.value)
    server.key = KEY
    asked = Server(server.url)
    asked.greet()
    assert asked.slots == 3 and KEY not in repr(vars(both.options))


def test_answers_of_another_form_are_the_servers_failure(both: Both, server: VLLMServer) -> None:
    answer = server.answer
    try:
        server.answer = lambda path, body: {"choices": [{"text": "hello"}]} if "comp" in path else answer(path, body)  # type: ignore[method-assign]
        with pytest.raises(InputError, match=r"an answer of another form than vLLM 0\.32's \(KeyError: 'index'\)"):
            VLLMEngine(*_fresh(both)).logprobs(batch())

        def unknown(path: str, body: Any) -> Any:
            return json.loads(re.sub(r'"logprob": [^,}]+', '"logprob": NaN', json.dumps(answer(path, body))))

        server.answer = unknown  # type: ignore[method-assign]
        with pytest.raises(InputError, match=r"an answer of another form .* \(ValueError: a log-prob of nan\)"):
            VLLMEngine(*_fresh(both)).logprobs(batch())

        def fewer(path: str, body: Any) -> Any:
            found = answer(path, body)
            for choice in found.get("choices", ()) if "comp" in path else ():
                choice["logprobs"] = {"token_logprobs": choice["logprobs"]["token_logprobs"][:-1]}
            return found

        server.answer = fewer  # type: ignore[method-assign]
        with pytest.raises(InputError, match=r"another form .* tokens with \d+ log-probs"):
            VLLMEngine(*_fresh(both)).sample(PROMPTS, 1, options())
        server.answer = lambda path, body: json.dumps([1])  # type: ignore[method-assign]
        with pytest.raises(InputError, match="an answer of another form"):
            open_base(both.options, torch.device("cpu"))
    finally:
        server.answer = answer  # type: ignore[method-assign]
