"""Directions that stay on a GPU are those of the readable path, to the bit; the path of a GPU is run on the CPU here."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_updates import PARAMS, random_update, same
from zopro.engine.gpu.trial import HostRead, NoHostReads
from zopro.zo import SPSA, Directions, Gaussian, ResidualFeedback, Signs, StepRecord, Targeted, Weights
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


LACKING = ("twin", "bias")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("noise", [Gaussian(), Signs(random_update(5))], ids=["gaussian", "signs"])
@pytest.mark.parametrize("lacks", ["mu", "v", "both", "all mu"])
def test_directions_of_all_tensors_at_once(lacks: str, noise: Directions, normalize: bool, on_gpu: Any) -> None:
    """Those of each by itself up to rounding, also where some have no mu or no v, or one element."""
    mu, v = random_update(1), random_update(2)
    for name in LACKING:
        if lacks in ("mu", "both"):
            del mu[name]
        if lacks in ("v", "both"):
            v[name].zero_()
    directions = Targeted({} if lacks == "all mu" else mu, v, total_steps=5, normalize=normalize, noise=noise)
    expected = [[directions.tensor(name, like, 3, step) for name, like in PARAMS] for step in (0, 4)]
    assert all(map(torch.equal, directions.tensors(PARAMS, 3, 4), expected[1])), "on a CPU one by one"
    on_gpu()
    for step, alone in zip((0, 4), expected, strict=True):
        for z, own in zip(directions.tensors(PARAMS, 3, step), alone, strict=True):
            torch.testing.assert_close(z, own, rtol=1e-5, atol=1e-6 * float(own.abs().max()))


class Operations(TorchDispatchMode):
    """How many are called."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name() not in NO_KERNELS
        return func(*args, **(kwargs or {}))


NO_KERNELS = ("aten::detach", "aten::view", "aten::empty_like", "aten::select.int", "aten::unbind.int", "aten::alias",
              "aten::empty.memory_format", "aten::unsqueeze", "aten::expand", "aten::_unsafe_view")  # fmt: skip


def adapters(layers: int) -> list[tuple[str, Tensor]]:
    shapes = {"A": (2, 6), "B": (6, 2), "C": (8, 2)}
    draw = torch.Generator().manual_seed(0)
    return [(f"{i}.{n}", torch.randn(shape, generator=draw)) for i in range(layers) for n, shape in shapes.items()]


def stepped(layers: int, kind: str) -> tuple[SPSA, list[StepRecord], int]:
    """Three steps of two groups; the records, and the operations of the last step beside the loss."""
    named = adapters(layers)
    groups = [{"params": named[::2], "weight_decay": 0.01}, {"params": named[1::2], "lr": 0.02, "eps": 0.02}]
    make = {"gaussian": Gaussian, "targeted": lambda: Targeted(dict(adapters(layers)), dict(adapters(layers)), 4)}[kind]
    records: list[StepRecord] = []
    spsa = SPSA(groups, lr=0.1, eps=0.01, directions=make(), seed=4, before_apply=records.append)
    losses = iter([0.3, 0.1, 0.2, 0.5, 0.9, 0.4] * 2)
    for _ in range(3):
        with Operations() as operations:
            spsa.step(lambda: next(losses))
    return spsa, records, operations.count


@pytest.mark.parametrize(("kind", "each"), [("gaussian", 1), ("targeted", 1)])
def test_kernels_of_a_step_hardly_grow_with_the_tensors(kind: str, each: int, on_gpu: Any) -> None:
    before = {layers: stepped(layers, kind)[2] for layers in (4, 8)}
    on_gpu()
    after = {layers: stepped(layers, kind)[2] for layers in (4, 8)}
    assert after[8] - after[4] == each * 4 * 3, "one draw a tensor"
    assert (before[8] - before[4]) / (4 * 3) > (15 if kind == "gaussian" else 60)
    assert after[4] < 8 * 3 + (20 if kind == "gaussian" else 120)


@pytest.mark.parametrize("kind", ["gaussian", "targeted"])
def test_a_replay_is_the_step_to_the_bit(kind: str, on_gpu: Any) -> None:
    """Though some tensors stood still, and another process draws nothing for them; and as the readable path."""
    plain, *_ = stepped(3, kind)
    on_gpu()
    spsa, records, _ = stepped(3, kind)
    ours, readable = ({n: t for n, t, _ in one.weights.movable} for one in (spsa, plain))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, readable[name], rtol=1e-5, atol=1e-6)
    still = ["1.A", "2.B"]
    records = [dataclasses.replace(record, left_out=still) for record in records]
    results = []
    for frozen in (False, True):
        named = adapters(3)
        weights = Weights.of([pair for pair in named if not (frozen and pair[0] in still)], spsa.directions)
        weights.groups = [
            {"params": [t for n, t in part if not (frozen and n in still)],
             "param_names": [n for n, _ in part if not (frozen and n in still)]}
            for part in (named[::2], named[1::2])
        ]  # fmt: skip
        for record in records:
            weights.apply(record)
        results.append(dict(named))
    assert same(*results) and torch.equal(results[0]["1.A"], dict(adapters(3))["1.A"])
    assert not torch.equal(results[0]["1.B"], dict(adapters(3))["1.B"])


@pytest.mark.parametrize("moments", [{"momentum": 0.9}, {"momentum": 0.9, "second_moment": 0.99}])
@pytest.mark.parametrize("kind", ["gaussian", "targeted"])
def test_steps_with_moments_draw_all_tensors_at_once(kind: str, moments: dict[str, float], on_gpu: Any) -> None:
    spsa, records, _ = stepped(3, kind)
    records = [dataclasses.replace(record, **moments, coefficients=[*record.coefficients, 0.3]) for record in records]

    def moved() -> tuple[dict[str, Tensor], int]:
        named = adapters(3)
        weights = Weights.of(named, spsa.directions)
        weights.groups = [{"params": [t for _, t in part], "param_names": [n for n, _ in part]}
                          for part in (named[::2], named[1::2])]  # fmt: skip
        with Operations() as operations:
            for record in records:
                weights.apply(record)
        return dict(named), operations.count

    expected, alone = moved()
    on_gpu()
    (found, together), (again, _) = moved(), moved()
    assert same(found, again) and together < alone
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_what_may_change_within_a_step_is_drawn_again(on_gpu: Any) -> None:
    assert not ResidualFeedback.pure and Directions.pure
    on_gpu()
    kept, directions, like = drawn_module.Drawn(), ResidualFeedback(), torch.zeros(2)
    for entries in ([3.0, 4.0], [4.0, 3.0]):
        directions.update({"w": torch.tensor(entries)}, step=0)
        assert torch.equal(kept.tensor(directions, "w", like, 0, 0), directions.tensor("w", like, 0, 0))
