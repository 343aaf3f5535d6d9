"""Guided directions as tensors: local products against autograd, mixing, and what must be refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from zopro.zo import Gaussian, Targeted
from zopro.zo.guided import LOCAL_ROWS, ResidualFeedback, factor_gradient, local_vjp


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.RMSNorm(6)])
def test_vjp_of_a_norm_is_autograd_s_in_any_number_of_pieces(norm: nn.Module) -> None:
    with torch.no_grad():
        norm.weight.copy_(normal(6, seed=3))
    x, cotangent = normal(2 * LOCAL_ROWS["cpu"] + 5, 6), normal(2 * LOCAL_ROWS["cpu"] + 5, 6, seed=1)
    leaf = x.clone().requires_grad_()
    expected = torch.autograd.grad(norm(leaf), [leaf, norm.weight], cotangent)
    with torch.no_grad():
        back, (weight,) = local_vjp(norm, x, cotangent, [norm.weight])
    assert torch.allclose(back, expected[0], atol=1e-6) and torch.allclose(weight, expected[1], rtol=1e-4, atol=1e-4)
    assert not back.requires_grad and not weight.requires_grad


def test_factor_gradient_is_autograd_s() -> None:
    a, inner = normal(3, 5), normal(7, 5, seed=1)
    b = normal(4, 3, seed=2).requires_grad_()
    delta = normal(7, 4, seed=4)
    (expected,) = torch.autograd.grad((2.0 * inner @ a.T @ b.T * delta).sum(), b)
    assert torch.allclose(factor_gradient(delta, inner @ a.T, 2.0), expected, atol=1e-5)


PARAMETERS = {"b": torch.zeros(4, 3), "a": torch.zeros(3, 5)}


def test_alone_it_is_the_pseudo_gradient_of_root_mean_square_one() -> None:
    directions = ResidualFeedback()
    gradient = 7 * normal(4, 3)
    directions.update({"b": gradient}, step=2)
    z = directions.sample(PARAMETERS.items(), seed=0, step=2)
    assert torch.allclose(z["b"], gradient / gradient.square().mean().sqrt(), atol=1e-6)
    assert not z["a"].any(), "what the guess does not reach stays"


def test_mixed_with_the_paper_s_direction() -> None:
    """z = a g + (1 - a)(b mu + c n_perp): every tensor is the weighted sum of its two sources."""
    base = Targeted({"b": normal(4, 3, seed=5)}, {"b": normal(4, 3, seed=6)}, total_steps=10)
    directions, gradient = ResidualFeedback(0.75, 0.25, base), normal(4, 3)
    directions.update({"b": gradient}, step=3)
    unit = gradient / gradient.square().mean().sqrt()
    z, other = directions.sample(PARAMETERS.items(), 1, 3), base.sample(PARAMETERS.items(), 1, 3)
    assert torch.allclose(z["b"], 0.75 * unit + 0.25 * other["b"], atol=1e-6)
    assert torch.allclose(z["a"], 0.25 * other["a"], atol=1e-6)
    assert isinstance(ResidualFeedback(0.5, 0.5).base, Gaussian)


def test_a_guess_belongs_to_its_step() -> None:
    directions = ResidualFeedback()
    with pytest.raises(RuntimeError, match=r"update: must be called for step 0"):
        directions.sample(PARAMETERS.items(), 0, 0)
    directions.update({"b": normal(4, 3)}, step=0)
    with pytest.raises(RuntimeError, match=r"update: must be called for step 1"):
        directions.sample(PARAMETERS.items(), 0, 1)


def test_what_is_no_direction_is_refused_or_zero() -> None:
    with pytest.raises(ValueError, match=r"guide: weights must not be negative and not both 0"):
        ResidualFeedback(0.0, 0.0)
    directions = ResidualFeedback()
    with pytest.raises(ValueError, match=r"gradients: must be finite"):
        directions.update({"b": torch.full((4, 3), math.nan)}, step=0)
    directions.update({"b": torch.zeros(4, 3)}, step=0)
    assert not directions.sample(PARAMETERS.items(), 0, 0)["b"].any()
