"""Directions that stay on a GPU are those of the readable path, to the bit; the path of a GPU is run on the CPU here."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_updates import PARAMS, random_update, same
from zopro.engine.gpu.trial import HostRead, NoHostReads
from zopro.zo import SPSA, Directions, Gaussian, ResidualFeedback, Signs, Targeted
from zopro.zo import drawn as drawn_module
from zopro.zo.directions import there
from zopro.zo.directions.base import norm_of
from zopro.zo.directions.targeted import _rescaled


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called: from now on the CPU counts as one."""

    def begin() -> None:
        monkeypatch.setattr(there, "ON", {"cpu"})

    return begin


def targeted(scale: float = 1.0) -> Targeted:
    mu = {name: scale * tensor for name, tensor in random_update(1).items()}
    v = random_update(2)
    first, second, *_ = mu
    mu[first], v[second] = torch.zeros_like(mu[first]), torch.zeros_like(v[second])
    return Targeted(mu, v, total_steps=5)


@pytest.mark.parametrize("scale", [1.0, 1e-25, 1e15])
def test_targeted_directions_are_the_same_bits(scale: float, on_gpu: Any) -> None:
    expected = [targeted(scale).sample(PARAMS, 3, step) for step in range(5)]
    on_gpu()
    directions = targeted(scale)
    assert all(same(directions.sample(PARAMS, 3, step), z) for step, z in enumerate(expected))


@pytest.mark.parametrize(
    "entries", [[0.0], [1e-40, 0.0], [3e38, 3e38], [1e-12, 2e-12], [-0.0, -2.0], [float("nan"), 1.0]]
)
def test_norms_at_their_ends(entries: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.tensor(entries)
    assert torch.equal(there.norm(noise).nan_to_num(-1), torch.tensor(norm_of(noise), dtype=torch.float64).nan_to_num(-1))
    expected = _rescaled(noise.clone(), 2.0)
    monkeypatch.setattr(there, "ON", {"cpu"})
    found = _rescaled(noise.clone(), 2.0)
    assert torch.equal(found.nan_to_num(-1), expected.nan_to_num(-1))


def test_the_host_does_not_wait(on_gpu: Any) -> None:
    directions = targeted()
    with pytest.raises(HostRead), NoHostReads():
        directions.sample(PARAMS, 0, 1)
    on_gpu()
    with NoHostReads():
        directions.sample(PARAMS, 0, 1)


class Counted(Directions):
    """Another's directions, counted."""

    def __init__(self, inner: Directions) -> None:
        self.inner, self.drawn = inner, Counter[str]()

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        self.drawn[name] += 1
        return self.inner.tensor(name, like, seed, step)


def trained(directions: Directions, steps: int = 3) -> dict[str, Tensor]:
    named = [(name, tensor.clone()) for name, tensor in PARAMS]
    optimizer = SPSA(named, lr=0.1, eps=0.01, directions=directions, queries=2, seed=4, weight_decay=0.01)
    for _ in range(steps):
        optimizer.step(lambda: sum((tensor * tensor).sum() for _, tensor in named))
    return dict(named)


@pytest.mark.parametrize(
    "make", [Gaussian, targeted, lambda: Signs(random_update(1))], ids=["gaussian", "targeted", "signs"]
)
def test_a_step_draws_each_direction_once(make: Any, on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Counted(make())
    expected = trained(plain)
    on_gpu()
    kept = Counted(make())
    assert same(trained(kept), expected)
    assert max(kept.drawn.values()) == 3 * 2 < max(plain.drawn.values())
    monkeypatch.setattr(drawn_module, "KEPT", 3)  # room for little
    assert same(trained(Counted(make())), expected)


def test_what_may_change_within_a_step_is_drawn_again(on_gpu: Any) -> None:
    assert not ResidualFeedback.pure and Directions.pure
    on_gpu()
    kept, directions, like = drawn_module.Drawn(), ResidualFeedback(), torch.zeros(2)
    for entries in ([3.0, 4.0], [4.0, 3.0]):
        directions.update({"w": torch.tensor(entries)}, step=0)
        assert torch.equal(kept.tensor(directions, "w", like, 0, 0), directions.tensor("w", like, 0, 0))
