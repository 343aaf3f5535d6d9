"""A recording at theta, played elsewhere."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical

from zopro.zo.frozen import OtherPath, record
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


FACTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach_": lambda x: (x.clone().detach_() * x).sum(),
    "new_tensor": lambda x: (x.new_tensor(x.detach()) * x).sum(),
    "tensor": lambda x: (torch.tensor(x.tolist()) * x).sum(),
    "full_like": lambda x: (torch.full_like(x, x.mean().item()) * x).sum(),
    "array": lambda x: float(np.asarray(x.detach()).mean()) * x.sum(),
    "deepcopy": lambda x: (copy.deepcopy(x.detach()) * x).sum(),
    "straight-through": lambda x: (3 * x + ((3 * x).round() - 3 * x).detach()).square().sum(),
    "where": lambda x: torch.where(x > x.mean(), x, x.detach()).square().sum(),
    "rows": lambda x: torch.einsum("ij,ij->", torch.stack([row.detach() for row in x]), x),
    "vmap": lambda x: (torch.vmap(lambda row: 2 * row)(x).detach() * x).sum(),
    "distribution": lambda x: (Categorical(logits=x.detach()).entropy() * x.sum(1)).sum(),
    "branch": lambda x: x.sum() / x.detach().norm().item() if x.detach().norm() > 1 else x.sum(),
}


@pytest.mark.parametrize("name", FACTORS)
def test_differences_with_the_factors_have_the_gradient_s_slope(w: Tensor, name: str) -> None:
    def loss() -> Tensor:
        return FACTORS[name](w)

    slope = float((torch.autograd.grad(loss(), w)[0] * Z).sum())
    frozen, eps = record(loss, [w]), 1e-2
    with torch.no_grad():
        sides = []
        for t in (eps, -eps):
            with InPlace([w]).at(lambda _, t=t: t * Z):  # type: ignore[misc]
                sides.append((frozen.replay(loss), float(loss())))
    kept, moved = ((plus - minus) / (2 * eps) for plus, minus in zip(*sides, strict=True))
    assert frozen.matters and kept == pytest.approx(slope, rel=1e-2)
    assert moved != pytest.approx(slope, rel=5e-2)


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
    assert not record(lambda: (w.detach().sum().item(), w.sum() * float("nan"))[1], [w]).matters
    assert record(lambda: w[w > 0].sum(), [w]).matters
    assert not record(lambda: (w * torch.rand_like(w).round() * torch.zeros_like(w)).sum(), [w]).matters


def test_another_path_is_refused(w: Tensor) -> None:
    turns = itertools.count()

    def fewer() -> Tensor:
        return (w * (w.detach() if next(turns) == 0 else X)).sum()

    frozen = record(fewer, [w])
    with pytest.raises(OtherPath, match=r"it calls|fewer functions"):
        frozen.replay(fewer)


def test_the_functions_of_torch_are_as_before(w: Tensor) -> None:
    before = torch.autograd.Function.apply
    with pytest.raises(ZeroDivisionError):
        record(lambda: w.sum() / 0 if w is None else 1 / 0, [w])
    assert torch.autograd.Function.apply == before
