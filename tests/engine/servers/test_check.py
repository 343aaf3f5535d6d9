"""The first look at an engine: llama.cpp passes it, and what is wrong with others is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_trainers import with_adapter
from zopro.engine import Abilities, Batch, Rollouts, Sampling
from zopro.engine.local.engine import LocalEngine
from zopro.engine.servers.check import check_engine
from zopro.errors import InputError
from zopro.system.random_state import preserve_random_state
from zopro.weights.adapters import tensor_name
from zopro.zo import Displacement, Gaussian, Weights

At = Sequence[Displacement | None]
PROMPTS = [[2, 3], [4, 5, 6]]
OPTIONS = Sampling(max_new_tokens=16, eos_token_ids=[1], pad_token_id=0)


class Sound(LocalEngine):
    """An engine that does what it says."""

    abilities = Abilities()

    def __init__(self) -> None:
        with preserve_random_state():
            torch.manual_seed(0)
            model = with_adapter().eval()
        named = [(tensor_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
        super().__init__(model, Weights.of(named, Gaussian()))
        self.calls = 0


class Deaf(Sound):
    """It answers without the adapter."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        return super().logprobs(batch, [None] * len(at), temperature)


class Stale(Sound):
    """It goes on with the adapter it had, once it has another one."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        others = [displacement for displacement in at if displacement is not None]
        return super().logprobs(batch, [at[0], *(others[:1] * (len(at) - 1))], temperature)


class Mixed(Sound):
    """It takes the rows of two displaced policies for each other's."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        found = super().logprobs(batch, at, temperature)
        displaced = [index for index, displacement in enumerate(at) if displacement is not None and len(at) > 1]
        for index in displaced:
            found[index] = found[index].flip(0)
        return found


class Partly(Sound):
    """Adapters on v_proj are left out, without a word."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        assert self.weights is not None
        kept = self.weights.left_out
        self.weights.left_out = [*kept, *(name for name, _, _ in self.weights.entries if "v_proj" in name)]
        try:
            return super().logprobs(batch, at, temperature)
        finally:
            self.weights.left_out = kept


class Servers(Sound):
    """Two servers, of which the second has another model."""

    def parts(self) -> list[Sound]:
        other = Sound()
        head = other.model.get_output_embeddings()
        head.weight.data.mul_(3)
        return [self, other]


class Restless(Sound):
    """Its batches are never twice the same."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        self.calls += 1
        return [tokens + 1e-3 * self.calls for tokens in super().logprobs(batch, at, temperature)]


class Split(Sound):
    """It samples from another policy than it scores."""

    def sample(self, *args: Any, **kwargs: Any) -> list[Rollouts]:
        found = super().sample(*args, **kwargs)
        for rollouts in found:
            rollouts.logprobs -= 1.0
        return found


class Broken(Sound):
    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        return [tokens * float("nan") for tokens in super().logprobs(batch, at, temperature)]


class Brittle(Sound):
    """Finite at theta, and not where it is displaced."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        found = super().logprobs(batch, at, temperature)
        return [tokens if one is None else tokens * float("nan") for tokens, one in zip(found, at, strict=True)]


class Coarse(Sound):
    """Its log-probs are off by what a little displacement changes altogether."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        found = super().logprobs(batch, at, temperature)
        return [tokens + 0.2 * torch.sin(1e9 * tokens.double()).float() for tokens in found]


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        (Deaf, "adapters are ignored"),
        (Stale, "a stale adapter or a prompt cached"),
        (Mixed, r"two adapters in one batch read .* nats a token otherwise than one after another"),
        (Partly, r"must be heeded on all modules that have one, got none on v_proj\."),
        (Servers, r"servers must hold one model, got .* nats a token between the first and number 2\."),
        (Restless, r"differ by 0\.00\d+ nats a token between two calls"),
        (Split, "samples from another policy than it scores"),
        (Broken, "are not finite"),
        (Brittle, "are not finite"),
    ],
)
def test_what_is_wrong_is_named(engine: type[Sound], what: str) -> None:
    with pytest.raises(InputError, match=what):
        check_engine(engine(), PROMPTS, OPTIONS, differences=False)


def test_a_sound_engine_shows_slopes_and_a_coarse_one_is_told_so() -> None:
    first, slope = check_engine(Sound(), PROMPTS, OPTIONS, differences=True)
    assert first.startswith("engine: theta repeats, adapters are heeded")
    assert "a slope stands" in slope
    assert "hides slopes: method: es needs none" in check_engine(Coarse(), PROMPTS, OPTIONS, differences=True)[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("xllamacpp", reason="needs zopro[llamacpp]")
    pytest.importorskip("gguf", reason="writes the test's GGUF files")
    from tiny import tiny_model, tiny_tokenizer
    from tiny_gguf import write_gguf
    from zopro.engine.servers.llamacpp.engine import LlamaCppEngine

    path: Path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    tokenizer = tiny_tokenizer()
    write_gguf(path, tiny_model("llama", tokenizer), tokenizer, "llama")
    made = LlamaCppEngine.of(path, 4, 8.0, Gaussian(), threads=1)
    yield made
    made.model.close()


def test_llama_cpp_is_sound(served: Any) -> None:
    first, slope = check_engine(served, PROMPTS, OPTIONS, differences=True)
    assert first.startswith("engine: theta repeats") and "a slope stands" in slope
