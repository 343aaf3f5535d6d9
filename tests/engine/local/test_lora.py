"""LoRA in one bfloat16 product: the numbers, what is never made, and where PEFT's own steps are taken."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.local import lora, products
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_logprobs

ROWS, INPUTS, OUTPUTS = 300, 96, 80


@pytest.fixture(autouse=True)
def able(monkeypatch):
    for module in (lora, products):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: True)


@pytest.fixture
def counted(monkeypatch):
    """Names of the adapters that were multiplied in one product."""
    names = []
    original = lora._InOneProduct.forward

    def forward(module, active_adapter, x, result, **kwargs):
        names.append(active_adapter)
        return original(module, active_adapter, x, result, **kwargs)

    monkeypatch.setattr(lora._InOneProduct, "forward", staticmethod(forward))
    return names


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def draw_adapters(model):
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = drawn(*parameter.shape, seed=len(name), scale=0.1)


def adapted_layer(kind=nn.Linear, dtype=torch.bfloat16, weight=0.1, biased=True, **options):
    """A model of one layer with an adapter of rank 4 whose B is not zero."""
    base = nn.Sequential(nn.Linear(INPUTS, OUTPUTS, biased) if kind is nn.Linear else Conv1D(OUTPUTS, INPUTS))
    base[0].weight.data = drawn(*base[0].weight.shape, scale=weight)
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], **options})
    model = get_peft_model(base.to(dtype), config).eval()
    draw_adapters(model)
    return model


def in_one_product(model, rows=ROWS):
    return lora.fewer_passes(model, torch.bfloat16, torch.device("cpu"), rows)


@torch.no_grad()
def output(model, x, context=None):
    with context or nullcontext():
        return model(x)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_and_its_adapter_to_bfloat16s_rounding(counted, kind, biased):
    model, x = adapted_layer(kind, biased=biased), drawn(3, ROWS // 3, INPUTS, seed=1).bfloat16()
    exact = output(model.float(), x.float())
    draw_adapters(model.bfloat16())
    found = output(model, x, in_one_product(model))
    peft = output(model, x)
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape and counted == ["default"]
    torch.testing.assert_close(found.float(), exact, rtol=2**-6, atol=2**-6)
    errors = [(result.float() - exact).square().mean().sqrt() for result in (found, peft)]
    assert errors[0] < 1.2 * errors[1]


def test_a_displacement_that_one_bfloat16_number_would_lose_is_seen():
    weight = drawn(4, INPUTS, scale=0.1)
    small = 2.0**-13 * weight.abs()
    before, after = (sum(part.double() for part in lora._two_numbers(value)) for value in (weight, weight + small))
    torch.testing.assert_close(after - before, small.double(), rtol=0.15, atol=0)
    assert ((weight + small).bfloat16() == weight.bfloat16()).float().mean() > 0.9


class _Types(TorchDispatchMode):
    """Sizes of the float32 tensors that are made."""

    def __init__(self):
        super().__init__()
        self.wide = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.wide.append(result.numel())
        return result


def test_nothing_as_large_as_the_layers_output_is_made_in_float32():
    model, x = adapted_layer(), drawn(ROWS, INPUTS, seed=1).bfloat16()
    with _Types() as peft:
        output(model, x)
    with _Types() as found:
        output(model, x, in_one_product(model))
    assert max(peft.wide) == ROWS * INPUTS and max(found.wide) < ROWS * 4


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_as_near_to_float32_as_pefts(counted, monkeypatch, kind):
    monkeypatch.setitem(lora.MANY, "cpu", 1)
    tokenizer = tiny_tokenizer()
    model = tiny_model(kind, tokenizer)
    model = get_peft_model(model.bfloat16(), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")).eval()
    exact = get_peft_model(tiny_model(kind, tokenizer), LoraConfig(r=4, lora_alpha=6, target_modules="all-linear")).eval()
    draw_adapters(model)
    exact.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    ids = torch.randint(3, 300, (6, 20), generator=torch.Generator().manual_seed(0))
    ids[1::2, :12] = ids[::2, :12]  # prompts of two answers each
    mask = torch.ones_like(ids)

    def logprobs(model):
        with torch.no_grad():
            return completion_logprobs(model, ids, mask, 8, num_generations=2)

    expected = logprobs(exact)
    assert not counted  # float32
    found = logprobs(model)
    assert counted
    counted.clear()
    monkeypatch.setitem(lora.MANY, "cpu", 10**6)
    peft = logprobs(model)
    assert not counted
    errors = [(result - expected).square().mean().sqrt() for result in (found, peft)]
    assert 0 < errors[0] < 1.5 * errors[1]
    found, none = (list(lora._adapted(causal_parts(m).backbone, torch.bfloat16, ids.device)) for m in (model, exact))
    assert found and not none


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _hooked(model):
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda *given: None)
    return model


def _replaced(model):
    layer = model.base_model.model[0].lora_B["default"]
    layer.forward = type(layer).forward.__get__(layer)
    return model


LEFT_ALONE = {
    "gradients": (adapted_layer, torch.enable_grad),
    "a function mode": (adapted_layer, _Mode),
    "a hook": (lambda: _hooked(adapted_layer()), torch.no_grad),
    "another forward": (lambda: _replaced(adapted_layer()), torch.no_grad),
    "float32": (lambda: adapted_layer(dtype=torch.float32), torch.no_grad),
    "adapters in bfloat16": (lambda: adapted_layer().bfloat16(), torch.no_grad),
    "dropout": (lambda: adapted_layer(lora_dropout=0.5).train(), torch.no_grad),
    "DoRA": (lambda: adapted_layer(use_dora=True), torch.no_grad),
    "a bias of B": (lambda: adapted_layer(lora_bias=True), torch.no_grad),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone(counted, case):
    make, context = LEFT_ALONE[case]
    model = make()
    x = drawn(ROWS, INPUTS, seed=1).to(model.base_model.model[0].weight.dtype)
    with torch.no_grad(), context(), in_one_product(model):
        model(x)
    assert not counted


def test_few_rows_and_other_processors_are_left_alone(counted, monkeypatch):
    model, x = adapted_layer(), drawn(ROWS, INPUTS, seed=1).bfloat16()
    output(model, x, in_one_product(model, lora.MANY["cpu"] - 1))
    monkeypatch.setattr(lora, "multiplies_bfloat16", lambda: False)
    output(model, x, in_one_product(model))
    assert not counted


@torch.no_grad()
def test_the_layer_is_as_before_also_after_an_error():
    model, x = adapted_layer(), drawn(ROWS, INPUTS, seed=1).bfloat16()
    before = output(model, x)
    layer = model.base_model.model[0]
    with pytest.raises(ValueError, match="stopped"), in_one_product(model):
        assert layer.lora_variant
        raise ValueError("stopped")
    assert not layer.lora_variant and layer.cast_input_dtype_enabled
    assert torch.equal(output(model, x), before)


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("dtype", "rows", "way"),
    [
        (torch.bfloat16, 32, lora._Added),
        (torch.bfloat16, lora.MANY["cuda"], lora._InOneProduct),
        (torch.float16, lora.MANY["cuda"], lora._Added),
        (torch.float32, 32, None),
    ],
)
def test_the_way_on_a_gpu(dtype, rows, way):
    assert lora._way(dtype, CUDA, rows) is way


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(lora, "LAUNCHED", {"cpu"})


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@torch.no_grad()
def test_added_in_place_is_pefts_to_the_bit(kind, dtype):
    model = adapted_layer(kind, dtype, lora_alpha=8)  # scaling 2
    x = drawn(5, INPUTS, seed=1).to(dtype)
    expected, layer = model(x), model.base_model.model[0]
    with lora.fewer_passes(model, dtype, torch.device("cpu"), 5):
        assert layer.lora_variant["default"] is lora._Added
        found = model(x)
    assert torch.equal(found, expected) and found.dtype == dtype and not layer.lora_variant


@pytest.mark.usefixtures("as_on_a_gpu")
@torch.no_grad()
def test_added_in_place_sees_a_scaling_of_any_number_and_a_second_adapter():
    model, x = adapted_layer(lora_alpha=6.7), drawn(5, INPUTS, seed=1).bfloat16()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    draw_adapters(model)
    model.base_model.set_adapter(["default", "other"])
    expected = model(x)
    with lora.fewer_passes(model, torch.bfloat16, torch.device("cpu"), 5):
        found = model(x)
    assert (found - expected).abs().max() < 2**-7 * expected.abs().max()
    assert (found - model.base_model.model[0].base_layer(x)).abs().max() > 0.1 * expected.abs().max()


def test_adapters_that_are_disabled_or_two(counted):
    model, x = adapted_layer(), drawn(ROWS, INPUTS, seed=1).bfloat16()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    with model.disable_adapter():
        assert torch.equal(output(model, x, in_one_product(model)), output(model, x))
    assert not counted
    model.base_model.set_adapter(["default", "other"])
    output(model, x, in_one_product(model))
    assert counted == ["default", "other"]
