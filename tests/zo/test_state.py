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
from zopro.zo import ES, SPSA


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


def test_state_of_other_names_is_refused_and_one_without_is_taken() -> None:
    opt = SPSA([("w", nn.Parameter(torch.ones(2)))])
    other = SPSA([("module.w", nn.Parameter(torch.ones(2)))], seed=7)
    with pytest.raises(ValueError, match=r"state_dict: must name tensors as here, .* got 'module\.w' for 'w'\. Pass"):
        opt.load_state_dict(other.state_dict())
    opt.load_state_dict(SPSA([nn.Parameter(torch.ones(2))], seed=7).state_dict())
    assert opt.param_groups[0]["param_names"] == ["w"] and opt.seed == 7


@pytest.mark.parametrize("optimiser", [SPSA, ES])
def test_what_was_measured_before_a_state_is_loaded_is_dropped(optimiser: type[SPSA] | type[ES]) -> None:
    opt = optimiser([torch.ones(2)])
    if isinstance(opt, SPSA):
        opt.estimate(lambda: 1.0)
    else:
        opt.accumulate([[1.0]] * opt.population)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="nothing to apply"):
        opt.step()


@pytest.mark.parametrize("kind", ["spsa", "es"])
def test_a_step_that_is_refused_can_be_taken_again(kind: str) -> None:
    """The journal's disk is full once; the scalars of a strategy are then as they were, as the parameters are."""

    def trained(fails: int) -> tuple[Tensor, dict[str, Any]]:
        w, calls = nn.Parameter(torch.tensor([3.0, 1.0])), []

        def before(record: Any) -> None:
            calls.append(record)
            if len(calls) == fails:
                raise OSError("disk full")

        opt: SPSA | ES
        if kind == "spsa":
            opt = SPSA([("w", w)], lr=0.1, second_moment_beta=0.9, before_apply=before)
        else:
            opt = ES([("w", w)], lr=0.1, sigma="auto", population=4, before_apply=before)
        scored = {"spsa": lambda: w.sum() ** 3, "es": lambda: -torch.stack([w.sum() ** 2, (w.sum() - 1) ** 2])}
        for _ in range(3):
            try:
                opt.step(scored[kind])
            except OSError:
                opt.step(scored[kind])
        return w.detach(), opt.strategy.state()

    (weight, state), (again, its) = trained(0), trained(2)
    assert torch.equal(weight, again) and repr(state) == repr(its)


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
