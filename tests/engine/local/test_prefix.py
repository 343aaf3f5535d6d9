"""Prompts that begin alike: each member reads the beginning once, and answers as if it had read every prompt whole."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from families import family_model
from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine import Rollouts, Sampling
from zopro.engine.batch import left_padded
from zopro.engine.gpu import decoding, memory
from zopro.engine.local import prefix
from zopro.engine.local.abilities import reads_prefixes
from zopro.engine.local.causal import Decoder, causal_parts
from zopro.engine.local.engine import LocalEngine
from zopro.zo import Displacement, Gaussian, Weights

SYSTEM = [7, 3, 9, 4, 11]
PROMPTS = [[*SYSTEM, 5, 6, 7], [*SYSTEM, 8, 9, 10, 11, 12], [*SYSTEM, 13], [*SYSTEM, 5, 20]]
AT = [Displacement(7, query, 3, t, (0.3,)) for query in range(2) for t in (1.0, -1.0)]


def policy(kind: str) -> tuple[Any, Weights]:
    model = get_peft_model(tiny_model(kind, tiny_tokenizer()), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for _, parameter in named:
        parameter.data.normal_(0, 0.2, generator=generator)
    return model, Weights.of(named, Gaussian())


def answered(model: Any, weights: Weights, together: bool, prompts: list[list[int]] = PROMPTS) -> list[Rollouts]:
    engine = LocalEngine(model, weights, **({} if together else {"member_tokens": 0}))
    options = Sampling(5, [2], 0, generator=torch.Generator().manual_seed(0), temperature=0.7)
    return engine.sample(prompts, 2, options, AT)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Rows and columns of each pass from now on."""
    found: list[tuple[int, int]] = []
    hidden = Decoder.hidden

    def seen(self: Decoder, input_ids: Tensor, *args: Any) -> Tensor:
        found.append((input_ids.shape[0], input_ids.shape[1]))
        return hidden(self, input_ids, *args)

    monkeypatch.setattr(Decoder, "hidden", seen)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_beginning_is_what_all_have_in_common(seed: int) -> None:
    draw = random.Random(seed)
    begin = [draw.randrange(1, 4) for _ in range(draw.randrange(5))]
    prompts = [[*begin, *(draw.randrange(1, 4) for _ in range(draw.randrange(1, 6)))] for _ in range(4)]
    common = 0
    while all(len(p) > common + 1 for p in prompts) and len({p[common] for p in prompts}) == 1:
        common += 1
    assert prefix.common_prefix(*left_padded(prompts, 0)) == common


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix, "LEAST_SAVED", 1)


@pytest.mark.parametrize(("kind", "fixed"), [*((kind, False) for kind in KINDS), ("gemma3", True), ("llama", True)])
def test_members_answer_as_one_after_another(
    kind: str, fixed: bool, small: None, passes: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = policy(kind)
    expected = answered(model, weights, together=False)
    if fixed:
        monkeypatch.setattr(decoding, "DEVICES", {"cpu"})
        monkeypatch.setattr(memory, "LEAST_COLUMNS", 8)
    answered(model, weights, together=True, prompts=PROMPTS[:2])  # with trials
    passes.clear()
    for mine, other in zip(answered(model, weights, together=True), expected, strict=True):
        assert torch.equal(mine.completion_ids, other.completion_ids)
        assert torch.equal(mine.prompt_ids, other.prompt_ids) and torch.equal(mine.prompt_mask, other.prompt_mask)
        torch.testing.assert_close(mine.logprobs, other.logprobs, atol=1e-4, rtol=0)
    rows, longest = len(AT) * len(PROMPTS), max(map(len, PROMPTS))
    shared = [(len(AT), len(SYSTEM)), (rows, longest - len(SYSTEM))]
    assert passes[:2] == shared if kind != "gemma3" else passes[0] == (rows, longest), "windows count the padding"


def test_it_is_left_alone_where_it_does_not_pay(passes: list[tuple[int, int]]) -> None:
    model, weights = policy("llama")
    for prompts, first in (
        (PROMPTS, (len(AT) * len(PROMPTS), max(map(len, PROMPTS)))),
        ([[*SYSTEM * 4, *prompt] for prompt in PROMPTS], (len(AT), 5 * len(SYSTEM))),
    ):
        answered(model, weights, together=True, prompts=prompts)
        passes.clear()
        answered(model, weights, together=True, prompts=prompts)
        assert passes[0] == first


@pytest.mark.parametrize("name", ["jamba", "gpt_neo", "gemma3_text"])
def test_windows_and_states_do_without(name: str) -> None:
    assert not reads_prefixes(causal_parts(family_model(name)))


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1.0), (torch.bfloat16, 0.1)], ids=str)
def test_what_reads_by_the_column_is_found_out(dtype: torch.dtype, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose positions count padding, as some linear biases do, or a share of it."""
    model = tiny_model("llama", tiny_tokenizer(), seed=5).to(dtype)
    forward = type(model.model).forward

    def by_column(self: Any, input_ids: Tensor, position_ids: Tensor, past_key_values: Any = None, **given: Any) -> Any:
        before = 0 if past_key_values is None else past_key_values.get_seq_length()
        columns = torch.arange(before, before + input_ids.shape[1])
        where = position_ids + share * (columns - position_ids)
        return forward(self, input_ids=input_ids, position_ids=where, past_key_values=past_key_values, **given)

    assert reads_prefixes(causal_parts(tiny_model("llama", tiny_tokenizer(), seed=6).to(dtype)))
    parts = causal_parts(model)
    monkeypatch.setattr(type(model.model), "forward", by_column)
    assert not reads_prefixes(parts)
