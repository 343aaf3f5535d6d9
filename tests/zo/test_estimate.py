"""What SPSA estimates, against autograd: slopes, their bias, and the loss that is reported."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tiny_problems import DIRECTIONS, flat, gradient, lora_over_bf16, mlp, slope, trainable, weights
from zopro.zo import SPSA, Gaussian


@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
@pytest.mark.parametrize("kind", DIRECTIONS)
def test_projected_gradient_is_autograd_s_directional_derivative(kind: str, perturbation: str) -> None:
    module, closure = mlp()
    directions = DIRECTIONS[kind](module)
    expected = slope(module, closure, directions)
    for sides, eps, tolerance in ((2, 3e-3, 2e-3), (1, 1e-3, 1e-2)):
        opt = SPSA(trainable(module), lr=0, eps=eps, directions=directions, sides=sides, perturbation=perturbation)
        opt.step(closure)
        assert opt.last.projected_gradient == pytest.approx(expected, rel=tolerance, abs=tolerance)


def test_projected_gradient_of_fp32_adapters_over_a_bf16_base() -> None:
    """The adapters' displacement is exact; what is left is the bf16 rounding of activations, so the bound is looser."""
    module, closure = lora_over_bf16()
    assert {p.dtype for _, p in trainable(module)} == {torch.float32}
    errors, sizes = [], []
    for seed in range(12):
        expected = slope(module, closure, Gaussian(), seed)
        opt = SPSA(trainable(module), lr=0, eps="auto", seed=seed)
        opt.step(closure)
        errors.append(opt.last.projected_gradient - expected)
        sizes.append(expected)
    assert math.hypot(*errors) < 0.1 * math.hypot(*sizes)


def test_double_precision_parameters_keep_it() -> None:
    module, _ = mlp(torch.float64)
    module.double()
    x, y = torch.randn(12, 6).double(), torch.randint(3, (12,))
    opt = SPSA(trainable(module), lr=0, eps=1e-5)
    opt.step(lambda: nn.functional.cross_entropy(module(x), y))
    expected = slope(module, lambda: nn.functional.cross_entropy(module(x), y), Gaussian())
    assert opt.last.projected_gradient == pytest.approx(expected, rel=1e-7)


def test_error_is_linear_in_eps_one_sided_and_quadratic_two_sided() -> None:
    """One-sided: g = slope + eps/2 z'Hz. Checked against the Hessian itself."""
    module, _ = mlp(torch.float64)
    module.double()
    x, y = torch.randn(12, 6).double(), torch.randint(3, (12,))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(module(x), y)

    z = {name: tensor.double() for name, tensor in Gaussian().sample(trainable(module), 0, 0).items()}
    named = trainable(module)
    first = torch.autograd.grad(loss(), [p for _, p in named], create_graph=True)
    along = sum((grad * z[name]).sum() for (name, _), grad in zip(named, first, strict=True))
    second = torch.autograd.grad(along, [p for _, p in named])
    curvature = float(sum((h * z[name]).sum() for (name, _), h in zip(named, second, strict=True)))

    def error(sides: int, eps: float) -> float:
        opt = SPSA(trainable(module), lr=0, eps=eps, sides=sides)
        opt.step(loss)
        return opt.last.projected_gradient - float(along.detach())

    for eps in (1e-3, 1e-4):
        assert error(1, eps) == pytest.approx(eps / 2 * curvature, rel=0.02)
    assert error(2, 3e-3) == pytest.approx(9 * error(2, 1e-3), rel=0.05)
    assert abs(error(2, 1e-3)) < abs(error(1, 1e-3)) / 50


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "low_rank"])
def test_mean_of_g_z_over_directions_approaches_the_gradient(kind: str) -> None:
    module, closure = mlp()
    true = flat(gradient(module, closure))
    queries = 6 * len(true)
    opt = SPSA(trainable(module), lr=1, eps=3e-3, directions=DIRECTIONS[kind](module), queries=queries)
    before = flat(weights(module))
    opt.step(closure)
    estimate = before - flat(weights(module))
    # n directions in d dimensions: |error| / |gradient| ~ sqrt(d / n), so the cosine is near 1 / sqrt(1 + 1 / 6).
    assert float(torch.cosine_similarity(estimate, true, dim=0)) > 0.87
    assert float(estimate @ true / (true @ true)) == pytest.approx(1, abs=0.15)


def test_loss_at_theta_is_what_is_reported() -> None:
    module, closure = mlp()
    expected = float(closure().detach())
    for sides, tolerance in ((1, 1e-6), (2, 1e-4)):
        opt = SPSA(trainable(module), lr=0, eps=1e-3, sides=sides)
        assert opt.step(closure) == pytest.approx(expected, abs=tolerance)


def test_a_known_loss_at_theta_saves_an_evaluation() -> None:
    module, closure = mlp()
    calls: list[float] = []

    def counted() -> Tensor:
        loss = closure()
        calls.append(float(loss))
        return loss

    known = float(closure().detach())
    opt = SPSA(trainable(module), lr=0, sides=1, queries=3)
    opt.estimate(counted, loss_at_theta=known)
    opt.apply()
    assert len(calls) == 4, "the first estimate compares it with an evaluation"
    calls.clear()
    opt.estimate(counted, loss_at_theta=known)
    saved = opt.apply()
    assert len(calls) == 3
    calls.clear()
    opt = SPSA(trainable(module), lr=0, sides=1, queries=3)
    opt.step(counted)
    opt.step(counted)
    assert len(calls) == 4 + 4
    assert opt.last.projected_gradients == pytest.approx(saved.projected_gradients)
    calls.clear()
    SPSA(trainable(module), lr=0, queries=3).step(counted)
    assert len(calls) == 6


def test_a_known_loss_that_an_evaluation_contradicts_is_not_used() -> None:
    module, closure = mlp()
    expected = SPSA(trainable(module), lr=0, sides=1)
    expected.step(closure)
    opt = SPSA(trainable(module), lr=0, sides=1)
    for _ in range(2):
        opt.estimate(closure, loss_at_theta=float(closure().detach()) + 0.1)
        opt.apply()
        opt.step_count = 0
    assert opt.trusts_known_loss is False
    assert opt.last.projected_gradient == expected.last.projected_gradient
    again = SPSA(trainable(module), lr=0, sides=1)
    again.load_state_dict(opt.state_dict())
    assert again.trusts_known_loss is False


def test_dropout_draws_the_same_mask_at_both_sides() -> None:
    """Without common random numbers the difference would be the masks' noise, 1/eps times larger than the slope."""
    module, closure = mlp(dropout=0.5)
    state = torch.get_rng_state()
    expected = slope(module, closure, Gaussian())
    for sides, tolerance in ((2, 5e-3), (1, 3e-2)):
        torch.set_rng_state(state)
        opt = SPSA(trainable(module), lr=0, eps=2e-3, sides=sides, queries=2, measure_noise=True)
        opt.step(closure)
        assert opt.last.projected_gradients[0] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
def test_autocast_around_the_step_sees_each_perturbation(perturbation: str) -> None:
    """Autocast caches casts of parameters that require grad; a stale cast would make every difference 0."""
    module, closure = mlp()
    expected = slope(module, closure, Gaussian())
    opt = SPSA(trainable(module), lr=1e-2, eps=0.05, perturbation=perturbation)
    x = torch.randn(4, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        closure()
        opt.step(closure)
        assert opt.last.projected_gradient == pytest.approx(expected, rel=0.15)
        inside = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(inside, module(x)), "after the step the cast weights must be those of the new theta"
