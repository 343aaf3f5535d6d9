"""Products of few rows by tiles: the numbers of MKL's own, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tiny import tiny_model, tiny_tokenizer
from zopro.engine.local import few_rows
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.products import fast_products
from zopro.engine.local.rollouts import generate
from zopro.engine.local.sampling import Sampler

CPU = torch.device("cpu")


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def products(monkeypatch):
    """The products taken by tiles, of weights of any size, results left as columns; MKL or not."""
    taken = []
    original = few_rows.linear
    monkeypatch.setattr(few_rows, "LARGE", 1)
    monkeypatch.setattr(few_rows, "MAX_ELEMENTS", 1000)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(few_rows, "linear", lambda x, w, b=None: taken.append(tuple(w.shape)) or original(x, w, b))
    return taken


@pytest.mark.parametrize("outputs", [20, 300, 1024, 1500])
@pytest.mark.parametrize("rows", [1, 4, 8, 9, 40])
@pytest.mark.parametrize("biased", [True, False])
def test_tiles_give_the_product(outputs, rows, biased, monkeypatch):
    """With tiles that fit the weight and that do not, in one piece of the result and in several."""
    x, weight = drawn(rows, 1, 33, dtype=torch.float64), drawn(outputs, 33, seed=1, dtype=torch.float64)
    bias = drawn(outputs, seed=2, dtype=torch.float64) if biased else None
    expected = functional.linear(x, weight, bias)
    torch.testing.assert_close(few_rows.linear(x, weight, bias), expected)
    monkeypatch.setattr(few_rows, "MAX_ELEMENTS", 2000)
    torch.testing.assert_close(few_rows.linear(x, weight, bias), expected)


def test_no_more_of_the_result_is_held_twice_than_the_limit(monkeypatch):
    sizes = []
    original = torch.bmm

    def bmm(a, b, **into):
        sizes.append(0 if into else len(a) * a.shape[1] * b.shape[2])
        return original(a, b, **into)

    monkeypatch.setattr(torch, "bmm", bmm)
    monkeypatch.setattr(few_rows, "MAX_ELEMENTS", 20_000)
    few_rows.linear(drawn(8, 4), drawn(5000, 4))
    assert max(sizes) <= 20_000 and sum(sizes) == 8 * (5000 // 64 * 64)
    sizes.clear()
    result = few_rows.linear(drawn(16, 4), drawn(5000, 4))
    assert sizes == [0] and result.T.is_contiguous() and result.shape == (16, 5000)
    assert few_rows.linear(drawn(16, 4), drawn(1000, 4)).is_contiguous()


@pytest.mark.parametrize("rows", [3, 41])
def test_other_numbers_of_rows_are_left_alone(products, rows):
    with torch.no_grad(), fast_products(torch.float32, CPU, rows):
        functional.linear(drawn(rows, 8), drawn(30, 8))
    assert products == []


def test_other_types_graphs_and_layouts_are_left_alone(products):
    x, weight = drawn(8, 8), drawn(30, 8)
    assert torch.is_grad_enabled() and not few_rows.gains(x, weight)
    with torch.no_grad():
        assert few_rows.gains(x, weight)
        assert not few_rows.gains(x.double(), weight.double())
        assert not few_rows.gains(x, drawn(8, 30).T)


def test_small_weights_are_left_alone():
    with torch.no_grad():
        assert not few_rows.gains(drawn(8, 8), drawn(30, 8))


@pytest.mark.parametrize("kind", ["gemma3", "llama"])
@pytest.mark.parametrize("copies", [4, 9])
def test_rollouts_are_the_same_tokens(products, kind, copies, monkeypatch):
    """Greedy answers, one row after the other through MKL's product, and together by tiles."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, tokenizer, seed=1)
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12]]
    settings = {"max_new_tokens": 6, "eos_token_ids": [], "pad_token_id": 0, "do_sample": False}
    together = generate(model, prompts, num_generations=copies, **settings)
    head = causal_parts(model).head.weight
    assert tuple(head.shape) in products and len(set(products)) > 2
    products.clear()
    monkeypatch.setattr(few_rows, "FEW", range(0))
    alone = generate(model, prompts, num_generations=1, **settings)
    assert products == []
    assert torch.equal(together.completion_ids, alone.completion_ids.repeat_interleave(copies, dim=0))
    torch.testing.assert_close(together.logprobs, alone.logprobs.repeat_interleave(copies, dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocabulary", [300, 1024, 2000])  # of no block, of some, of some and a rest
@pytest.mark.parametrize("options", [{"do_sample": False}, {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_rows_that_are_columns_are_sampled_alike(options, vocabulary):
    settings = {"do_sample": True, "temperature": 0.7, "top_k": None, "top_p": 1.0, "min_p": 0.0} | options
    logits, uniform = drawn(9, vocabulary), torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns = logits.T.contiguous().T
    assert columns.stride() == (1, 9)
    tokens, scores = Sampler(**settings).draw(logits.clone(), uniform)
    assert len(set(tokens.tolist())) > 4
    if not settings["do_sample"]:
        assert torch.equal(tokens, logits.argmax(-1))
    found, theirs = Sampler(**settings).draw(columns, uniform)
    assert torch.equal(found, tokens)
    torch.testing.assert_close(theirs, scores)
