"""Several queries a step, a second moment, and directions that learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tiny_problems import flat, mlp, trainable, weights
from zopro.zo import SPSA, Gaussian, Rademacher, Signs, Targeted


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
        for _ in range(60):
            opt.step(closure)
        assert float(closure().detach()) < 0.8 * start


@pytest.mark.parametrize("seed", range(2))
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
