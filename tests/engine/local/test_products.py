"""bfloat16 weights multiplied in float32: the numbers, what is converted, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.local import products
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.products import fast_products, linear, times_weight

CPU = torch.device("cpu")


@pytest.fixture
def emulating(monkeypatch):
    """A CPU without bfloat16 instructions, and no weight too small to gain."""
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(products, "NARROW", 8)
    monkeypatch.setattr(products, "FEW", 1)
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 500)


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("biased", [True, False])
def test_a_product_is_the_float32_one_rounded_once(emulating, biased):
    x, weight, bias = drawn(2, 5, 33), drawn(70, 33, seed=1), drawn(70, seed=2) if biased else None
    exact = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert torch.equal(linear(x, weight, bias), exact.bfloat16())


def test_gradients_are_those_of_float32(emulating):
    leaves = [drawn(2, 5, 33), drawn(70, 33, seed=1), drawn(70, seed=2)]
    upstream = drawn(2, 5, 70, seed=3)
    wide = [leaf.float().requires_grad_() for leaf in leaves]
    expected = torch.autograd.grad(functional.linear(*wide), wide, upstream.float())
    found = torch.autograd.grad(linear(*(leaf.requires_grad_() for leaf in leaves)), leaves, upstream)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=2**-7, atol=2**-6)


def test_the_way_back_is_summed_in_float32(emulating):
    x, weight = drawn(5, 70).float(), drawn(70, 33, seed=1)
    torch.testing.assert_close(times_weight(x, weight), x @ weight.float())


def test_no_more_than_a_piece_of_a_weight_is_converted_at_once(emulating, monkeypatch):
    sizes = []
    original = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: sizes.append(tensor.numel()) or original(tensor))
    linear(drawn(1, 20), drawn(300, 20, seed=1))
    assert max(sizes) <= 500 and sum(sizes) == 20 + 300 * 20


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_lie_as_near_to_those_of_float32_as_bfloat16s_own(emulating, kind, monkeypatch):
    """The model of the same (rounded) weights in float32 is the truth."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, tokenizer, seed=1).bfloat16()
    truth = tiny_model(kind, tokenizer, seed=1)
    truth.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    ids = torch.randint(3, 300, (8, 30), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    calls = []
    original = products._product
    monkeypatch.setattr(products, "_product", lambda x, w, b=None: calls.append(w.shape) or original(x, w, b))

    def error():
        with torch.no_grad():
            ours = completion_logprobs(model, ids, mask, 20, num_generations=1)
            return float((ours - completion_logprobs(truth, ids, mask, 20)).square().mean().sqrt())

    with_float32 = error()
    assert len(calls) > 8
    calls.clear()
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: True)
    assert with_float32 <= 1.5 * error() and not calls


def test_adapters_learn_through_it(emulating, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_model("llama", tokenizer).bfloat16(), LoraConfig(target_modules="all-linear", r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    ids = torch.randint(3, 300, (4, 20), generator=torch.Generator().manual_seed(0))
    mask, found = torch.ones_like(ids), []
    trained = [p for p in model.parameters() if p.requires_grad]
    for instructions in (False, True):
        monkeypatch.setattr(products, "multiplies_bfloat16", lambda instructions=instructions: instructions)
        loss = completion_logprobs(model, ids, mask, 10).sum()
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, trained)]))
    assert functional.cosine_similarity(*found, dim=0) > 0.99


@pytest.mark.parametrize("dtype, device", [(torch.float32, CPU), (torch.bfloat16, torch.device("meta"))])
def test_other_models_are_left_alone(emulating, dtype, device):
    with fast_products(dtype, device) as mode:
        assert mode is None


def test_narrow_and_mixed_layers_are_left_alone(emulating, monkeypatch):
    monkeypatch.setattr(products, "_product", None)
    with fast_products(torch.bfloat16, CPU):
        assert functional.linear(drawn(5, 33), drawn(8, 33)).dtype == torch.bfloat16
        assert functional.linear(drawn(5, 33).float(), drawn(70, 33).float()).dtype == torch.float32


def test_a_deep_model_is_known_by_its_own_logits(emulating):
    """Rounding in many layers parts the two ways to multiply; head and backbone are checked in the same one."""
    model = tiny_model("llama", tiny_tokenizer(), seed=1, num_hidden_layers=40).bfloat16()
    assert causal_parts(model).model is model


def test_calls_by_keyword_run_as_they_are(emulating):
    x, weight = drawn(5, 33), drawn(70, 33, seed=1)
    with fast_products(torch.bfloat16, CPU):
        assert torch.equal(functional.linear(input=x, weight=weight), functional.linear(x, weight=weight))
        query = drawn(1, 2, 4, 8)
        assert functional.scaled_dot_product_attention(query=query, key=query, value=query).dtype == torch.bfloat16
