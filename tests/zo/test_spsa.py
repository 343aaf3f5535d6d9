"""SPSA against autograd, and as an ordinary torch optimiser: groups, schedulers, accumulation, state, replay."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from zopro.zo import SPSA, Directions, Gaussian, LowRank, Rademacher, Ranks, Signs, Targeted

Problem = tuple[nn.Module, Callable[[], Tensor]]


@pytest.fixture(autouse=True)
def fixed_global_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def mlp(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Problem:
    """Two layers with a norm between them, on a fixed batch."""
    module = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(12, 6, dtype=dtype), torch.randint(3, (12,))
    return module, lambda: nn.functional.cross_entropy(module(x).float(), y)


def lora_over_bf16() -> Problem:
    """Adapters in fp32 over a bf16 base, both factors away from 0."""
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    module = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    x, y = torch.randn(12, 6).bfloat16(), torch.randint(3, (12,))
    return module, lambda: nn.functional.cross_entropy(module(x).float(), y)


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


def flat(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def gradient(module: nn.Module, closure: Callable[[], Tensor]) -> dict[str, Tensor]:
    named = trainable(module)
    grads = torch.autograd.grad(closure(), [p for _, p in named])
    return {name: grad for (name, _), grad in zip(named, grads, strict=True)}


def slope(module: nn.Module, closure: Callable[[], Tensor], directions: Directions, seed: int = 0) -> float:
    """Autograd's derivative of the loss along the direction of step 0."""
    return float(flat(gradient(module, closure)) @ flat(directions.sample(trainable(module), seed, 0)))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def previous(module: nn.Module) -> Targeted:
    named = trainable(module)
    return Targeted({n: torch.randn_like(p) for n, p in named}, {n: torch.randn_like(p) for n, p in named}, 10)


DIRECTIONS = {
    "gaussian": lambda m: Gaussian(),
    "rademacher": lambda m: Rademacher(),
    "low_rank": lambda m: LowRank(),
    "signs": lambda m: Signs({n: torch.randn_like(p) for n, p in trainable(m)}),
    "targeted": previous,
}

# Estimates against autograd.


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
    queries = 20 * len(true)
    opt = SPSA(trainable(module), lr=1, eps=3e-3, directions=DIRECTIONS[kind](module), queries=queries)
    before = flat(weights(module))
    opt.step(closure)
    estimate = before - flat(weights(module))
    # n directions in d dimensions: |error| / |gradient| ~ sqrt(d / n), so the cosine is near 1 / sqrt(1 + 1 / 20).
    assert float(torch.cosine_similarity(estimate, true, dim=0)) > 0.96
    assert float(estimate @ true / (true @ true)) == pytest.approx(1, abs=0.1)


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


# The update.


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


def test_several_queries_are_averaged() -> None:
    module, closure = mlp()
    named, before = trainable(module), weights(module)
    opt = SPSA(named, lr=0.1, queries=3, seed=1)
    opt.step(closure)
    seeds = [opt.query_seed(query, 1) for query in range(3)]
    assert len(set(seeds)) == 3 and seeds[0] == 1
    for name, parameter in named:
        terms = [
            g * Gaussian().tensor(name, parameter, s, 0) for g, s in zip(opt.last.projected_gradients, seeds, strict=True)
        ]
        assert torch.allclose(parameter, before[name] - 0.1 * sum(terms) / 3, atol=1e-6)


def test_second_moment_makes_lr_the_change_of_a_typical_step() -> None:
    for factor in (1e-3, 1e4):
        module, closure = mlp()
        opt = SPSA(trainable(module), lr=1e-4, second_moment_beta=0.9)
        sizes = []
        for _ in range(30):
            before = flat(weights(module))
            opt.step(lambda closure=closure, factor=factor: factor * closure())
            sizes.append(float((flat(weights(module)) - before).square().mean().sqrt()))
        assert sizes[0] == pytest.approx(1e-4, rel=0.2)
        assert sum(sizes) / len(sizes) == pytest.approx(1e-4, rel=0.4)


@pytest.mark.parametrize("options", [{}, {"sides": 1}, {"queries": 4}, {"directions": Rademacher()}, {"eps": "auto"}])
def test_it_learns(options: dict[str, Any]) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        module, closure = mlp()
        start = float(closure().detach())
        opt = SPSA(trainable(module), lr=0.01, seed=seed, second_moment_beta=0.9, **options)
        for _ in range(100):
            opt.step(closure)
        assert float(closure().detach()) < 0.8 * start


@pytest.mark.parametrize("seed", range(4))
def test_signs_find_which_tensors_should_go_back_along_the_update(seed: int) -> None:
    """Eight of twelve tensors go on along mu, four go back: Gaussian noise learns the mean of that, signs each."""
    generator = torch.Generator().manual_seed(seed)
    mu = {f"w{i}": torch.randn(6, 5, generator=generator) for i in range(12)}
    goals = [tensor if i % 3 else -tensor for i, tensor in enumerate(mu.values())]
    left = {}
    for noise in (Gaussian(), Signs(mu)):
        named = [(name, torch.zeros(6, 5)) for name in mu]
        opt = SPSA(named, lr=0.05, directions=Targeted(mu, {}, 80, noise=noise), seed=seed, second_moment_beta=0.9)

        def loss(named: Any = named) -> Any:
            return sum((tensor - goal).square().sum() for (_, tensor), goal in zip(named, goals, strict=True))

        losses = [opt.step(loss) for _ in range(80)]
        left[type(noise)] = float(losses[-1]) / float(losses[0])
    assert left[Signs] < 0.2 and left[Signs] < 0.3 * left[Gaussian]


# As an ordinary optimiser.


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


@pytest.mark.parametrize("options", [{}, {"eps": "auto", "second_moment_beta": 0.9, "queries": 2, "sides": 1}])
def test_state_dict_continues_to_the_bit(options: dict[str, Any], tmp_path: Any) -> None:
    module, closure = mlp(dropout=0.2)
    opt = SPSA(trainable(module), lr=0.02, seed=3, **options)
    for _ in range(3):
        opt.step(closure)
    torch.save([module.state_dict(), opt.state_dict()], tmp_path / "state.pt")
    state = torch.get_rng_state()
    for _ in range(3):
        opt.step(closure)
    expected, last = weights(module), opt.last

    module_state, optimizer_state = torch.load(tmp_path / "state.pt", weights_only=True)
    module.load_state_dict(module_state)
    torch.set_rng_state(state)
    again = SPSA(trainable(module), lr=9.0, seed=77, **options)
    again.load_state_dict(optimizer_state)
    for _ in range(3):
        again.step(closure)
    assert same(expected, weights(module))
    assert repr(again.last) == repr(last)  # repr: NaN equals NaN


def test_state_of_another_optimiser_is_refused() -> None:
    module, _ = mlp()
    other = torch.optim.SGD(module.parameters(), lr=1.0)
    with pytest.raises(ValueError, match="must come from SPSA"):
        SPSA(trainable(module)).load_state_dict(other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_of_records_is_bit_identical(dtype: torch.dtype) -> None:
    module, closure = mlp(dtype)
    start = copy.deepcopy(module)
    directions = previous(module)
    opt = SPSA(trainable(module), lr=0.05, weight_decay=0.01, directions=directions, queries=2, seed=5)
    records = []
    for _ in range(4):
        opt.step(closure)
        records.append(opt.last)
    assert not same(weights(start), weights(module))
    player = SPSA(trainable(start), lr=123.0, directions=directions, seed=999, queries=1, eps=7.0)
    for record in records:
        player.replay(type(record)(**dataclasses.asdict(record)))
    assert same(weights(start), weights(module))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_skips_counts_and_says_so(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    module, closure = mlp()
    before = weights(module)
    values = iter([1.0, bad])
    opt = SPSA(trainable(module), lr=0.1, weight_decay=0.1, second_moment_beta=0.9)
    with caplog.at_level(logging.WARNING):
        opt.step(lambda: torch.tensor(next(values)))
    assert same(before, weights(module)), "neither update nor decay"
    assert opt.last.skipped and opt.skipped_steps == 1 and opt.step_count == 1
    assert "step 0 skipped" in caplog.text and "not finite" in caplog.text
    opt.replay(opt.last)
    assert same(before, weights(module))
    opt.step(closure)
    assert not opt.last.skipped and opt.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_one_bad_micro_batch_skips_the_whole_step() -> None:
    module, closure = mlp()
    before = weights(module)
    opt = SPSA(trainable(module), lr=0.1)
    opt.estimate(closure)
    opt.estimate(lambda: torch.tensor(math.nan))
    assert opt.apply().skipped
    assert same(before, weights(module))
    opt.estimate(closure)
    assert not opt.apply().skipped, "the bad estimate must not stay behind"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
@pytest.mark.parametrize("call", [0, 1, 4])
def test_theta_is_restored_when_the_closure_raises(call: int, perturbation: str, dtype: torch.dtype) -> None:
    module, closure = mlp(dtype)
    before, calls = weights(module), iter(range(100))

    def failing() -> Tensor:
        loss = closure()
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss

    opt = SPSA(trainable(module), lr=0.1, eps="auto", perturbation=perturbation)
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing)
    assert same(before, weights(module))
    assert opt.step_count == 0
    opt.step(closure)
    assert not same(before, weights(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_theta_to_the_bit(dtype: torch.dtype) -> None:
    for perturbation in ("in_place", "virtual"):
        module, closure = mlp(dtype)
        before = weights(module)
        SPSA(trainable(module), eps=0.3, perturbation=perturbation, queries=3, measure_noise=True).measure(closure)
        assert same(before, weights(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_virtual_equals_in_place_to_the_bit(dtype: torch.dtype) -> None:
    module, _ = mlp(dtype, dropout=0.3)
    twin = copy.deepcopy(module)
    x, y = torch.randn(12, 6, dtype=dtype), torch.randint(3, (12,))
    results = []
    for m, perturbation in ((module, "in_place"), (twin, "virtual")):
        torch.manual_seed(1)
        opt = SPSA(trainable(m), lr=0.05, eps="auto", queries=2, perturbation=perturbation)
        for _ in range(3):
            opt.step(lambda m=m: nn.functional.cross_entropy(m(x).float(), y))
        results.append((repr(opt.last), weights(m)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


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


@pytest.mark.parametrize("eps", ["auto", 1e-3])
def test_global_random_state_moves_as_by_one_evaluation(eps: float | str) -> None:
    module, closure = mlp(dropout=0.5)
    state = torch.get_rng_state()
    closure()
    after_one = torch.get_rng_state()
    torch.set_rng_state(state)
    opt = SPSA(trainable(module), eps=eps, queries=3, measure_noise=True)
    assert torch.equal(torch.get_rng_state(), state)
    opt.step(closure)
    assert torch.equal(torch.get_rng_state(), after_one)


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


def test_no_parameter_gets_a_gradient_and_no_graph_is_built() -> None:
    module, closure = mlp()
    seen = []
    SPSA(trainable(module), lr=0.1).step(lambda: seen.append(closure()) or seen[-1])
    assert all(not loss.requires_grad for loss in seen)
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


def test_closure_may_return_a_float() -> None:
    w = nn.Parameter(torch.ones(3))
    SPSA([("w", w)], lr=0.1).step(lambda: float(w.square().sum()))
    assert not torch.equal(w, torch.ones(3))


def test_ranks_that_average_their_losses_stay_equal() -> None:
    """Two ranks with other data: each averages the scalars it exchanged, and ends at the same bits."""
    module, _ = mlp()
    ranks = [copy.deepcopy(module) for _ in range(2)]
    data = [(torch.randn(6, 6), torch.randint(3, (6,))) for _ in range(2)]

    def losses(m: nn.Module) -> list[Callable[[], Tensor]]:
        return [lambda x=x, y=y: nn.functional.cross_entropy(m(x), y) for x, y in data]

    exchanged: list[list[float]] = []
    for rank, m in enumerate(ranks):
        local, other = losses(m)[rank], losses(m)[1 - rank]
        other_values: list[float] = []

        def evaluate(local: Any = local, other: Any = other, seen: list[float] = other_values) -> Tensor:
            seen.append(float(other()))
            return local()

        class Pair(Ranks):
            def __init__(self, rank: int = rank) -> None:
                self.parallel, self.rank, self.size = "data", rank, 2

            def gather(self, values: Any, seen: list[float] = other_values) -> list[list[float]]:
                rows = [list(values), seen[-len(values) :]]
                exchanged.append(rows if self.rank == 0 else rows[::-1])
                return exchanged[-1]

        opt = SPSA(trainable(m), lr=0.05, ranks=Pair(), sides=1, queries=2)
        for _ in range(3):
            opt.step(evaluate)
    assert same(weights(ranks[0]), weights(ranks[1]))
    assert len(exchanged) == 6 and exchanged[:3] == exchanged[3:], "one exchange a step"


# Noise, eps and what is said about them.


def test_auto_eps_is_chosen_once_per_run_and_signal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    module, closure = mlp()
    opt = SPSA([{"params": trainable(module)[:2]}, {"params": trainable(module)[2:], "eps": 1e-3}], eps="auto", lr=0.01)
    calls = []
    with caplog.at_level(logging.INFO, logger="zopro"):
        opt.step(lambda: calls.append(0) or closure())
    first = len(calls)
    assert "noise floor" in caplog.text
    opt.step(lambda: calls.append(0) or closure())
    assert len(calls) - first == 2
    assert isinstance(opt.param_groups[0]["eps"], float)
    assert opt.param_groups[1]["eps"] == 1e-3, "a group's own eps stays"
    assert opt.last.signal_to_noise > 3
    assert opt.last.eps == [group["eps"] for group in opt.param_groups]


def test_noise_floor_is_measured_only_when_asked_for() -> None:
    module, closure = mlp()
    opt = SPSA(trainable(module))
    opt.step(closure)
    assert math.isnan(opt.last.signal_to_noise)
    opt = SPSA(trainable(module), measure_noise=True)
    opt.step(closure)
    assert 1e-9 < opt.signal.noise_floor < 1e-5
    expected = abs(2 * 1e-3 * opt.last.projected_gradient) / math.sqrt(2) / opt.signal.noise_floor
    assert opt.last.signal_to_noise == pytest.approx(expected, rel=1e-6)


def test_low_signal_is_warned_of_and_not_at_every_step(caplog: pytest.LogCaptureFixture) -> None:
    """The paper's eps in bf16: L+ - L- is rounding."""
    module, closure = mlp(torch.bfloat16)
    opt = SPSA(trainable(module), lr=0, eps=1e-5, measure_noise=True)
    with caplog.at_level(logging.WARNING, logger="zopro"):
        for _ in range(20):
            opt.step(closure)
    warnings = [record.message for record in caplog.records]
    assert opt.last.signal_to_noise < 3 and opt.signal.low_steps == 20
    assert len(warnings) == 5 and all("signal-to-noise" in w and "eps='auto'" in w for w in warnings)
    caplog.clear()
    module, closure = mlp()
    opt = SPSA(trainable(module), lr=0, eps="auto")
    with caplog.at_level(logging.WARNING, logger="zopro"):
        opt.step(closure)
    assert not caplog.records


def test_auto_eps_waits_for_a_batch_that_says_something() -> None:
    """RLOO's first batch may have no advantage at all, or be broken: neither may decide eps for the whole run."""
    module, closure = mlp()
    before = weights(module)
    opt = SPSA(trainable(module), lr=0.1, eps="auto", second_moment_beta=0.9)
    opt.step(lambda: torch.tensor(math.nan))
    assert opt.last.skipped and opt.skipped_steps == 1 and math.isnan(opt.last.eps[0])
    opt.step(lambda: torch.tensor(0.25))
    assert not opt.last.skipped and opt.last.projected_gradient == 0 and math.isnan(opt.last.signal_to_noise)
    assert same(before, weights(module))
    state = opt.state_dict()
    opt = SPSA(trainable(module), lr=0.1, eps="auto", second_moment_beta=0.9)
    opt.load_state_dict(state)
    opt.step(closure)
    assert opt.last.eps[0] < 0.01 and opt.last.signal_to_noise > 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, ["lr", "not be negative", "-1.0"]),
        ({"lr": math.nan}, ["lr", "nan"]),
        ({"eps": 0}, ["eps", "greater than 0", "'auto'", "0"]),
        ({"eps": "tiny"}, ["eps", "'tiny'"]),
        ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
        ({"queries": 0}, ["queries", "at least 1"]),
        ({"sides": 3}, ["sides", "1 or 2", "3"]),
        ({"second_moment_beta": 1.0}, ["second_moment_beta", "[0, 1)", "1.0"]),
        ({"perturbation": "copy"}, ["perturbation", "in_place", "virtual", "'copy'"]),
        ({"directions": Targeted({"v": torch.ones(2)}, {}, 3)}, ["previous_update", "'w'", "'v'"]),
        ({"directions": Targeted({"w": torch.ones(3)}, {}, 3)}, ["previous_update", "'w'", "(2,)", "(3,)"]),
    ],
)
def test_bad_arguments_get_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        SPSA([("w", nn.Parameter(torch.ones(2)))], **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_parameters_get_one_line() -> None:
    with pytest.raises(ValueError, match=r"params: 'q' must be floating point, got torch.int8"):
        SPSA([("q", torch.ones(2, dtype=torch.int8))])
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"params: names must differ.*'w' twice"):
        SPSA([{"params": [("w", a)]}, {"params": [("w", b)]}])
