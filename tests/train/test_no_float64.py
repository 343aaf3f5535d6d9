"""On a device without float64 (MPS) nothing there is of that type: whole steps, walked through on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tiny_trainers import es, same, weights, with_adapter, zopro
from tiny_updates import PARAMS, random_update
from zopro.engine import batch as batch_module
from zopro.engine.batch import uniform_numbers
from zopro.engine.local.sampling import invert
from zopro.system.random_state import preserve_random_state
from zopro.zo import Gaussian, Targeted, Weights
from zopro.zo import evaluation as evaluation_module
from zopro.zo.directions import there
from zopro.zo.evaluation import Evaluator


class NoFloat64(TorchDispatchMode):
    """The CPU as a device without float64, and as its host: float64 is made by `host` alone, and of what that made."""

    def __init__(self) -> None:
        super().__init__()
        self.legal = WeakTensorKeyDictionary()
        self.on_host = self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        wide = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.dtype == torch.float64]
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                if not self.on_host and not (wide and all(x in self.legal for x in wide)):
                    raise AssertionError(f"{func} gives float64 on the device")
                self.legal[tensor] = True
                self.made += 1
        return result

    def host(self, function: Any) -> Any:
        def call(*args: Any) -> Any:
            self.on_host += 1
            try:
                return function(*args)
            finally:
                self.on_host -= 1

        return call


@contextmanager
def without_float64(patch: pytest.MonkeyPatch) -> Iterator[NoFloat64]:
    mode = NoFloat64()
    patch.setattr(there, "NARROW", {"cpu"})
    patch.setattr(there, "ON", {"cpu"})
    patch.setattr(there, "in_float64", mode.host(there.in_float64))  # which takes a tensor to the host
    patch.setattr(batch_module, "_drawn", mode.host(batch_module._drawn))  # by generators of the host
    with mode:
        yield mode


def test_the_walk_would_find_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(3)
    for make in (x.double, lambda: x.sum(dtype=torch.float64), lambda: torch.zeros(2, dtype=torch.float64)):
        with pytest.raises(AssertionError, match="gives float64 on the device"), without_float64(monkeypatch):
            make()
    with without_float64(monkeypatch) as mode:
        assert float(there.in_float64(x).mean().exp()) > 0 and mode.made == 3


def every_other(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(place % 2) for place in range(len(completions))]


@pytest.mark.parametrize("method", ["zopro", "clipped", "es"])
def test_steps(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling, rewards, references, targeted directions, eps from the noise floor, both sides, the update."""
    with preserve_random_state():
        model = with_adapter()
        draw = torch.Generator().manual_seed(0)
        mu, v = (
            {name: torch.randn(p.shape, generator=draw) * 1e-2 for name, p in model.named_parameters() if p.requires_grad}
            for _ in range(2)
        )
        options: dict[str, Any] = {
            "model": model,
            "max_steps": 1,
            "max_completion_length": 3,
            "previous_update": mu,
            "reward_update": v,
        }
        if method != "es":  # unequal rewards, whatever is answered
            options |= {"reward_funcs": every_other, "per_device_train_batch_size": 4, "num_generations": 4}
        options |= {"top_k": 5, "top_p": 0.9, "beta": 0.1} if method == "zopro" else {}
        options |= {"surrogate": "clipped", "sides": 1, "eps": 0.01} if method == "clipped" else {}
        options |= {"targeted": True, "population": 4} if method == "es" else {}
        trainer = es(tmp_path, **options) if method == "es" else zopro(tmp_path, **options)
        before = weights(model)
        with without_float64(monkeypatch):
            trainer.train()
        assert not same(weights(model), before)


def test_tokens_are_drawn_by_numbers_of_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly always those of float64; never one of weight 0, also at 1."""
    draw = torch.Generator().manual_seed(0)
    chances = torch.rand(2000, 50, generator=draw) ** 4
    chances[:, 40:] = 0
    seeded = torch.Generator().manual_seed(1)
    wide = uniform_numbers(seeded, 2000, 1, torch.device("cpu"))[:, 0]
    monkeypatch.setattr(there, "NARROW", {"cpu"})
    narrow = uniform_numbers([torch.Generator().manual_seed(1)], 1, 3, torch.device("cpu"))
    assert narrow.dtype == torch.float32 and wide.dtype == torch.float64
    expected, found = invert(chances, wide)[0], invert(chances, wide.float())[0]
    assert (expected == found).float().mean() > 0.999
    sums = chances * torch.linspace(1, 2, 2000)[:, None]
    assert int(invert(sums, torch.ones(2000))[0].max()) < 40


def test_directions_are_those_of_float64_but_for_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    directions = Targeted(random_update(1), random_update(2), total_steps=3)
    expected = directions.sample(PARAMS, 0, 1)
    monkeypatch.setattr(there, "NARROW", {"cpu"})
    monkeypatch.setattr(there, "ON", {"cpu"})
    for name, z in directions.sample(PARAMS, 0, 1).items():
        torch.testing.assert_close(z, expected[name], rtol=1e-6, atol=1e-6)


def test_evaluations_begin_with_the_same_random_state_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for torch.mps: what is read from it is put back before each evaluation."""
    state, set_to = torch.tensor([7], dtype=torch.uint8), list[Tensor]()
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.mps, "set_rng_state", set_to.append)
    there_ = torch.device("mps")
    assert evaluation_module._random_state(there_) is state
    evaluator = Evaluator(Weights.of([("w", torch.zeros(2))], Gaussian()))
    evaluator._there = {there_: state}
    assert evaluator.results(lambda: 1.0, [None, None], float) == [1.0, 1.0] and set_to == [state, state]
