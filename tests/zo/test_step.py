"""What a step does with the estimate: decay, groups, micro-batches, schedulers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tiny_problems import flat, gradient, mlp, same, slope, trainable, weights
from zopro.zo import SPSA, Gaussian


def test_update_is_minus_lr_times_g_z_plus_decayed_theta() -> None:
    module, closure = mlp()
    named = trainable(module)
    before = weights(module)
    opt = SPSA(named, lr=0.1, eps=1e-3, weight_decay=0.2, seed=4)
    opt.step(closure)
    z = Gaussian().sample(named, seed=4, step=0)
    for name, parameter in named:
        decayed = 0.2 * before[name] if parameter.dim() >= 2 else 0
        expected = before[name] - 0.1 * (opt.last.projected_gradient * z[name] + decayed)
        assert torch.allclose(parameter, expected, atol=1e-6), name
    assert {name for name, p in named if p.dim() < 2} == {"0.bias", "1.weight", "1.bias", "4.bias"}


def test_decay_alone_spares_biases_and_norms() -> None:
    module, _ = mlp()
    before = weights(module)
    opt = SPSA(trainable(module), lr=0.5, weight_decay=0.1)
    opt.step(lambda: torch.tensor(1.0))
    for name, parameter in module.named_parameters():
        factor = 0.95 if name in ("0.weight", "4.weight") else 1
        assert torch.allclose(parameter, before[name] * factor), name


def test_groups_have_their_own_lr_eps_and_decay() -> None:
    module, closure = mlp()
    first = [(n, p) for n, p in trainable(module) if n.startswith("0")]
    rest = [(n, p) for n, p in trainable(module) if not n.startswith("0")]
    groups = [{"params": first, "lr": 0.0}, {"params": rest, "eps": 1e-4, "weight_decay": 0.3}]
    before, grads = weights(module), gradient(module, closure)
    opt = SPSA(groups, lr=0.01, eps=3e-3)
    z = Gaussian().sample(trainable(module), 0, 0)
    opt.step(closure)
    after = weights(module)
    assert all(torch.equal(before[n], after[n]) for n, _ in first), "lr 0 must not move"
    # Every group takes lr times (displacement's slope / its own eps) z: the estimate stays unbiased in each.
    along = sum(float((grads[n] * z[n]).sum()) * (3e-3 if n.startswith("0") else 1e-4) for n in z)
    for name, parameter in rest:
        decay = 0.3 * before[name] if parameter.dim() >= 2 else 0
        expected = before[name] - 0.01 * (along / 1e-4 * z[name] + decay)
        assert torch.allclose(parameter, expected, rtol=1e-2, atol=2e-3), name
    assert opt.last.eps == [3e-3, 1e-4]


def test_groups_with_own_eps_are_unbiased() -> None:
    module, closure = mlp()
    true = gradient(module, closure)
    first = [(n, p) for n, p in trainable(module) if n.startswith("0")]
    rest = [(n, p) for n, p in trainable(module) if not n.startswith("0")]
    before = weights(module)
    count = 15 * sum(p.numel() for p in module.parameters())
    opt = SPSA([{"params": first, "eps": 6e-3}, {"params": rest, "eps": 2e-3}], lr=1.0, queries=count)
    opt.step(closure)
    estimate = {n: before[n] - p for n, p in weights(module).items()}
    for group in (first, rest):
        a, b = (flat({n: tensors[n] for n, _ in group}) for tensors in (estimate, true))
        assert float(a @ b / (b @ b)) == pytest.approx(1, abs=0.25)


def test_a_group_added_later_is_perturbed_too() -> None:
    module, closure = mlp()
    named = trainable(module)
    opt = SPSA(named[:2], lr=0, eps=3e-3)
    opt.step(closure)
    opt.add_param_group({"params": named[2:]})
    opt.step_count = 0
    opt.step(closure)
    assert opt.last.projected_gradient == pytest.approx(slope(module, closure, Gaussian()), rel=1e-2)
    with pytest.raises(ValueError, match="names must differ"):
        opt.add_param_group({"params": [("0.weight", nn.Parameter(torch.ones(2)))]})
    assert len(opt.param_groups) == 2


def test_unnamed_tensors_draw_different_noise() -> None:
    a, b = nn.Parameter(torch.zeros(50)), nn.Parameter(torch.zeros(50))
    SPSA([a, b], lr=1.0).step(lambda: a.sum() + b.sum())
    assert not torch.equal(a, b)


def test_two_half_batches_equal_one_batch() -> None:
    modules = [mlp()[0] for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    x, y = torch.randn(12, 6), torch.randint(3, (12,))

    def loss(module: nn.Module, rows: slice) -> Callable[[], Tensor]:
        return lambda: nn.functional.cross_entropy(module(x[rows]), y[rows])

    whole, halves = (SPSA(trainable(m), lr=0.05, queries=2, measure_noise=True) for m in modules)
    for _ in range(3):
        whole.step(loss(modules[0], slice(0, 12)))
        halves.estimate(loss(modules[1], slice(0, 6)))
        halves.estimate(loss(modules[1], slice(6, 12)))
        assert halves.apply().loss == pytest.approx(whole.last.loss, rel=1e-5)
        assert halves.last.projected_gradients == pytest.approx(whole.last.projected_gradients, rel=1e-3)
    for a, b in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_weights_of_micro_batches_and_zero_grad() -> None:
    module, closure = mlp()
    opt = SPSA(trainable(module), lr=0)
    estimate = opt.measure(closure)
    opt.accumulate(estimate, weight=5.0)
    opt.zero_grad()
    opt.accumulate(estimate, weight=0.25)
    opt.accumulate(estimate, weight=0.75)
    assert opt.apply().projected_gradient == pytest.approx(estimate.differences[0] / 1e-3)
    opt.accumulation = "sum"
    opt.accumulate(estimate, weight=0.5)
    assert opt.apply().projected_gradient == pytest.approx(0.5 * estimate.differences[0] / 1e-3)
    with pytest.raises(RuntimeError, match="nothing to apply"):
        opt.apply()
    with pytest.raises(RuntimeError, match="nothing to apply"):
        opt.step()


def test_learning_rate_scheduler() -> None:
    module, closure = mlp()
    opt = SPSA(trainable(module), lr=0.4)
    scheduler = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.0, total_iters=4)
    used = []
    for _ in range(5):
        before = weights(module)
        opt.step(closure)
        scheduler.step()
        used += opt.last.learning_rates
    assert used == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0])
    assert same(before, weights(module)), "at learning rate 0 nothing moves"


def test_closure_may_return_a_float() -> None:
    w = nn.Parameter(torch.ones(3))
    SPSA([("w", w)], lr=0.1).step(lambda: float(w.square().sum()))
    assert not torch.equal(w, torch.ones(3))
