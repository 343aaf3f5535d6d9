"""A recording at theta, played elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from zopro.zo.frozen import Diverged, record
from zopro.zo.perturbation import InPlace, Perturbation, Virtual

GENERATOR = torch.Generator().manual_seed(0)
START, Z, X = (torch.randn(3, 4, generator=GENERATOR) for _ in range(3))


@pytest.fixture
def w() -> Tensor:
    return torch.nn.Parameter(START.clone())


@pytest.mark.parametrize("perturbation", [InPlace, Virtual])
def test_only_the_factors_stay_as_they_were(w: Tensor, perturbation: Callable[..., Perturbation]) -> None:
    def loss() -> Tensor:
        return (w.detach().exp() * (w * X).sin()).sum()

    frozen = record(loss, [w])
    assert frozen.matters and frozen.loss == float(loss().detach())
    with torch.no_grad(), perturbation([w]).at(lambda _: 0.1 * Z):
        found = frozen.replay(loss)
    assert found == pytest.approx(float((START.exp() * ((START + 0.1 * Z) * X).sin()).sum()), rel=1e-6)


def test_a_recording_keeps_no_activations_and_counts_them(w: Tensor) -> None:
    kept: list[Any] = []

    def loss() -> Tensor:
        value = (w * X).exp().sum()  # the product's factors are a parameter and an input: 12 exponentials are left
        kept.append(value.grad_fn)
        return value

    assert record(loss, [w]).saved_bytes == 12 * 4
    with pytest.raises(RuntimeError, match="a backward pass of its own"):
        _ = kept[0].next_functions[0][0]._saved_result


def test_what_matters_is_what_reaches_the_loss(w: Tensor) -> None:
    assert not record(lambda: w.square().sum(), [w]).matters
    assert not record(lambda: (w.detach().sum().item(), (w > 0).sum().item(), w.square().sum())[2], [w]).matters
    assert record(lambda: w.square().sum() / (w > 0).sum().item(), [w]).matters
    assert record(lambda: w[w > 0].sum(), [w]).matters
    assert not record(lambda: (w * torch.rand_like(w).round() * torch.zeros_like(w)).sum(), [w]).matters


def test_another_path_is_refused(w: Tensor) -> None:
    turns = itertools.count()

    def fewer() -> Tensor:
        return (w * (w.detach() if next(turns) == 0 else X)).sum()

    frozen = record(fewer, [w])
    with pytest.raises(Diverged, match=r"it calls|fewer functions"):
        frozen.replay(fewer)


def test_the_functions_of_torch_are_as_before(w: Tensor) -> None:
    before = torch.autograd.Function.apply
    with pytest.raises(ZeroDivisionError):
        record(lambda: w.sum() / 0 if w is None else 1 / 0, [w])
    assert torch.autograd.Function.apply == before
