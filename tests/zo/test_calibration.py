"""The noise of the loss: eps that is chosen from it, the signal, and what is said about them."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from tiny_problems import mlp, same, trainable, weights
from zopro.zo import SPSA


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
