"""Steps too small for a tensor's numbers, or too large for a network."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tiny_branches import Two, loss_of, moved
from tiny_problems import weights
from zopro.zo import SPSA, Rademacher, SPSAStrategy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_resolution_of_a_tensor_are_said_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(dtype).removeprefix("torch.")
    weight = nn.Parameter(torch.full((400,), 1.0, dtype=dtype))
    opt = SPSA([weight], lr=1e-5, second_moment_beta=0.9)
    before = weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger="zopro"):
        for _ in range(9):
            opt.step(lambda: weight.float().square().sum())
    said = [record.message for record in caplog.records if "resolution" in record.message]
    assert len(said) == 1 and name in said[0] and "float32" in said[0] and "raise the learning rate" in said[0]
    assert torch.equal(weight, before), "no entry has moved"
    caplog.clear()
    for lr, kind in ((0.1, dtype), (1e-5, torch.float32)):
        other = nn.Parameter(torch.ones(400, dtype=kind))
        with caplog.at_level(logging.WARNING, logger="zopro"):
            SPSA([other], lr=lr, second_moment_beta=0.9).step(lambda other=other: other.float().square().sum())
    assert not caplog.records


def test_where_eps_is_chosen_the_remedy_is_another_one(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.ones(50))

    def rough() -> float:
        return 1 + 1e-3 * float((1e5 * weight.double().sum()).sin())

    opt = SPSA([weight], lr=0, eps="auto")
    with caplog.at_level(logging.WARNING, logger="zopro"):
        for _ in range(4):
            opt.step(rough)
    said = [record.message for record in caplog.records if "signal-to-noise" in record.message]
    assert said and all("eps='auto'" not in line and "raise eps" not in line for line in said)
    assert all("more prompts" in line and "float32" in line and "learning rate" in line for line in said)


@pytest.mark.parametrize("lr", [1e20, 1e12])
def test_a_step_that_no_network_survives_is_refused_before_anything_moves(lr: float) -> None:
    model = Two()
    before, written = weights(model), []
    opt = SPSA(model.named_parameters(), lr=lr, before_apply=written.append)
    with pytest.raises(ValueError, match=r"lr: must leave weights that a network can work with, got .*Lower") as error:
        opt.step(loss_of(model))
    assert "\n" not in str(error.value) and not moved(before, model) and not written
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"lr: must leave weights"):
        SPSA([half], lr=1e4).step(lambda: half.float().square().sum())
    with pytest.raises(ValueError, match=r"lr: must leave weights"):
        SPSA(model.named_parameters(), lr=lr, weight_decay=0.1).step(lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"lr: must be finite"):
        SPSA(model.named_parameters(), lr=float("inf"))


def test_steps_over_the_deviation_of_the_losses() -> None:
    """FZOO: (L_i - L(theta)) / (N std(L)), which no eps and no scale of the loss changes."""
    strategy = SPSAStrategy(eps=0.1, sides=1, queries=3, over_std=True)
    strategy.ask(0)
    losses = [2.0, 3.0, 7.0, 1.0]
    record = strategy.tell(losses)
    deviation = float(torch.tensor(losses[1:]).std())
    assert record.coefficients == pytest.approx([(loss - 2.0) / 3 / deviation for loss in losses[1:]])
    strategy.ask(1)
    assert strategy.tell([1.0] * 4).coefficients == [0.0] * 3, "no loss differs"
    for options in ({"sides": 2, "queries": 3}, {"sides": 1, "queries": 1}):
        with pytest.raises(ValueError, match="over_std: must have sides=1 and at least 2 queries"):
            SPSAStrategy(over_std=True, **options)
    with pytest.raises(
        ValueError, match=r"second_moment_beta: must be None with over_std, which normalises as well, got 0\.9"
    ):
        SPSAStrategy(over_std=True, sides=1, queries=2, second_moment_beta=0.9)
    theta = torch.ones(4)
    opt = SPSA([("w", theta)], 0.1, 0.1, Rademacher(), queries=3, sides=1, over_std=True)
    opt.step(lambda: theta.square().sum())
    assert 0 < float((theta - 1).abs().max()) < 0.5
