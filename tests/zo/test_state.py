"""State and records: what is continued or replayed is equal to the bit."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_branches import MODES
from tiny_problems import mlp, previous, same, trainable, weights
from zopro.zo import SPSA


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
    assert player.step_count == opt.step_count, "a further step is no step 0"


# Copies.


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("mode", [*MODES, "together"])
def test_a_copy_goes_on_as_the_original(how: str, mode: str, tmp_path: Any) -> None:
    options = MODES.get(mode, {"evaluation": "together"})
    weight, x = nn.Parameter(torch.ones(2, 3)), torch.arange(12.0).view(2, 2, 3).cos()

    def loss(opt: SPSA, w: Tensor) -> Callable[[], Tensor]:
        rows = lambda n: nn.functional.linear(torch.cat([x] * n), w)  # noqa: E731
        return lambda: (opt.together.rows(lambda: rows(2)) if opt.together.active else rows(1)).square().sum()

    told: list[Any] = []
    opt = SPSA([("w", weight)], lr=1e-3, before_apply=told.append, measure_noise=True, **options)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt)  # which puts a step of its own on the optimiser
    for _ in range(2):
        opt.step(loss(opt, weight))
        scheduler.step()
    if how == "deepcopy":
        other = copy.deepcopy(opt)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(opt))
    else:
        torch.save(opt, tmp_path / "opt.pt")
        other = torch.load(tmp_path / "opt.pt", weights_only=False)
    copied = other.param_groups[0]["params"][0]
    assert copied is not weight and torch.equal(copied, weight)
    for _ in range(2):
        opt.step(loss(opt, weight))
        other.step(loss(other, copied))
    assert torch.equal(copied, weight) and repr(other.last) == repr(opt.last)
    assert other.before_apply is None
