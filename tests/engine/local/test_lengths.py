"""Rows in groups of about the same length: the same log-probs and scores, of fewer tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification

from families import family_model
from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.local import lengths
from zopro.engine.local.lengths import by_length
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.scores import shared_scores

COPIES, PROMPT, ANSWER = 4, 24, 16
PROMPTS, ANSWERS = (24, 3, 22, 4), (16, 2, 0, 3, 1, 15, 2, 2, 3, 2, 14, 1, 2, 16, 3, 1)
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
MORE = {"gemma2": CAPPED, "mamba2": {}, "jamba": {}}  # soft caps; states alone; prompts that cannot be shared


def batch(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Four prompts with four answers each, all of unequal lengths, one of them empty."""
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, vocabulary, (len(PROMPTS), PROMPT), generator=draw).repeat_interleave(COPIES, 0)
    ids = torch.cat([prompts, torch.randint(3, vocabulary, (len(ANSWERS), ANSWER), generator=draw)], 1)
    mask = torch.ones_like(ids)
    for row, length in enumerate(ANSWERS):
        mask[row, : PROMPT - PROMPTS[row // COPIES]] = 0
        mask[row, PROMPT + length :] = 0
    return ids * mask, mask


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens of each pass, padding included."""
    tokens: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: tokens.append(args[0].numel()))
    try:
        yield tokens
    finally:
        hook.remove()


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Any:
    def begin(cost: int) -> None:
        monkeypatch.setitem(lengths.PASS, "cpu", cost)

    return begin


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
@pytest.mark.parametrize("copies", [1, COPIES])
def test_log_probs_are_those_of_all_rows_in_one_pass(kind: str, copies: int, grouped: Any) -> None:
    model = family_model(kind, **MORE[kind]) if kind in MORE else tiny_model(kind, tiny_tokenizer(), seed=1)
    ids, mask = batch(model.config.vocab_size)
    with torch.no_grad():
        given = {"temperature": 0.7, "return_entropy": True, "num_generations": copies}
        completion_logprobs(model, ids, mask, ANSWER)  # whatever is done once for each model
        with counted(model) as before:
            expected = completion_logprobs(model, ids, mask, ANSWER, **given)
        grouped(8)
        with counted(model) as after:
            found = completion_logprobs(model, ids, mask, ANSWER, **given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert found[0].abs().min(1).values[2] == 0 and found[0][2].abs().max() == 0, "an empty answer"
    assert len(after) > len(before) and sum(after) + 8 * len(after) < sum(before) + 8 * len(before)


def test_few_tokens_more_than_without_any_padding(grouped: Any) -> None:
    model = tiny_model("llama", tiny_tokenizer())
    ids, mask = batch(300)
    grouped(4)
    with torch.no_grad():
        completion_logprobs(model, ids, mask, ANSWER)  # whatever is done once for each model
        with counted(model) as tokens:
            completion_logprobs(model, ids, mask, ANSWER, num_generations=COPIES)
    packed = sum(PROMPTS) + sum(min(length, ANSWER - 1) for length in ANSWERS)
    assert packed <= sum(tokens) <= 1.15 * packed < 0.6 * (4 * PROMPT + 16 * (ANSWER - 1))


def test_gradients_take_one_pass(grouped: Any) -> None:
    """Baselines with back-propagation keep their numbers."""
    model = tiny_model("llama", tiny_tokenizer())
    ids, mask = batch(300)
    expected = completion_logprobs(model, ids, mask, ANSWER, num_generations=COPIES)
    grouped(4)
    assert torch.equal(completion_logprobs(model, ids, mask, ANSWER, num_generations=COPIES), expected)


def test_scores(grouped: Any) -> None:
    config = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config.num_labels, config.pad_token_id = 1, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(config).eval()
    prompts = [list(range(3, 3 + n)) for n in (9, 4)]
    endings = [[row + 3] * n for row, n in enumerate((12, 1, 2, 1, 11, 2))]
    expected = shared_scores(model, prompts, endings, 3)
    grouped(4)
    with counted(model) as tokens:
        torch.testing.assert_close(shared_scores(model, prompts, endings, 3), expected)
    assert tokens[-3:] == [18, 2 * 12, 4 * 2]


def test_the_fewest_tokens() -> None:
    """Against all ways to cut the sorted rows."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randint(0, 30, (8,), generator=draw).tolist()
        ranked, least = sorted(rows), []
        for cuts in itertools.product((False, True), repeat=7):
            parts = [list(part) for part in _parts(ranked, cuts)]
            least.append(sum(5 + len(part) * max(part) for part in parts))
        groups = by_length(rows, 5)
        assert sorted(itertools.chain(*groups)) == list(range(8)) and all(group == sorted(group) for group in groups)
        assert sum(5 + len(group) * max(rows[row] for row in group) for group in groups) == min(least)
    many = torch.randint(0, 4000, (500,), generator=draw).tolist()
    groups = by_length(many, 100)
    assert sum(len(g) * max(many[row] for row in g) for g in groups) < 1.1 * sum(many)


def _parts(rows: list[int], cuts: tuple[bool, ...]) -> Iterator[list[int]]:
    first = 0
    for place, cut in enumerate((*cuts, True), 1):
        if cut:
            yield rows[first:place]
            first = place


def test_on_a_cpu_all_rows_go_together() -> None:
    """So that runs stay bit-equal."""
    assert lengths.pass_cost(torch.device("cpu")) is None and by_length([9, 1, 1], None) == [[0, 1, 2]]
