"""The noise of the loss: eps that is chosen from it, the signal, and what is said about them."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from tiny_problems import mlp, same, trainable, weights
from zopro.zo import SPSA


def test_auto_eps_is_kept_while_it_shows_slopes_and_signal_is_logged(caplog: pytest.LogCaptureFixture) -> None:
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


def test_a_group_that_is_added_gets_an_eps_and_older_steps_replay() -> None:
    a, b = (nn.Parameter(torch.ones(5, 3)) for _ in "ab")
    opt = SPSA([("a", a)], lr=1e-2, eps="auto")
    records = []

    def loss() -> torch.Tensor:
        return (a - 2).square().sum() + (b - 2).square().sum()

    opt.step(loss)
    records.append(opt.last)
    opt.add_param_group({"params": [("b", b)]})
    opt.step(loss)
    records.append(opt.last)
    assert not opt.last.skipped and opt.last.eps[0] == opt.last.eps[1] > 0 and bool((b != 1).all())
    again = [nn.Parameter(torch.ones(5, 3)) for _ in "ab"]
    other = SPSA([{"params": [(name, p)]} for name, p in zip("ab", again, strict=True)], lr=1e-2, eps=1e-3)
    for record in records:
        other.replay(record)
    assert torch.equal(again[0], a) and torch.equal(again[1], b)


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


def test_eps_is_chosen_anew_where_the_signal_stays_low(caplog: pytest.LogCaptureFixture) -> None:
    """The loss falls a thousand times more gently after some steps, so that its rounding hides the differences."""
    weight = torch.zeros(50, requires_grad=True)
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope, calls = 1.0, []

    def closure() -> torch.Tensor:
        calls.append(0)
        return torch.round(slope * gradient @ weight.double() * 2**20) / 2**20

    def steps(opt: SPSA, count: int) -> list[tuple[float, float, int]]:
        found = []
        for _ in range(count):
            calls.clear()
            opt.step(closure)
            found.append((opt.last.eps[0], opt.last.signal_to_noise, len(calls)))
        return found

    opt = SPSA([weight], lr=0, eps="auto")
    usual = steps(opt, 8)
    assert len({eps for eps, _, _ in usual}) == 1 and all(count == 2 for _, _, count in usual[1:])
    slope = 1e-3
    before = steps(opt, 1)
    assert before[0][0] == usual[0][0] and before[0][1] < 3
    state = opt.state_dict()
    resumed = SPSA([weight], lr=0, eps="auto")
    resumed.load_state_dict(state)
    with caplog.at_level(logging.INFO, logger="zopro"):
        after = steps(opt, 6)
    assert "noise floor" in caplog.text
    assert after[0][2] > 2 and all(count == 2 for _, _, count in after[1:])
    assert after[0][0] > 10 * usual[0][0] and sum(signal > 3 for _, signal, _ in after) >= 4
    assert steps(resumed, 6) == after


class NoisyLine:
    """A loss that slopes alike along all weights, with noise of 1e-6."""

    def __init__(self) -> None:
        self.weight = torch.zeros(4, requires_grad=True)
        self._draws = torch.Generator().manual_seed(0)

    def step(self, opt: SPSA, slope: float) -> int:
        """One step; how many evaluations it took."""
        calls = []

        def loss() -> torch.Tensor:
            calls.append(0)
            noise = torch.randn((), generator=self._draws, dtype=torch.float64)
            return slope * self.weight.double().sum() + 1e-6 * noise

        opt.step(loss)
        return len(calls)


def test_a_loss_that_shows_no_slope_leaves_eps_and_is_searched_ever_more_seldom() -> None:
    line = NoisyLine()
    opt = SPSA([line.weight], lr=0, eps="auto")
    line.step(opt, slope=1.0)
    chosen, anew = opt.last.eps[0], []
    for step in range(1, 40):
        count = line.step(opt, slope=0.0)
        assert opt.last.eps[0] == chosen
        if count > 2:
            anew.append(step)
    assert anew[0] in (2, 3) and 2 <= len(anew) <= 5


def test_a_chosen_eps_is_looked_at_before_it_is_chosen_anew() -> None:
    """One flat step makes it doubted; the next direction slopes as the first did, which two evaluations show."""
    line = NoisyLine()
    opt = SPSA([line.weight], lr=0, eps="auto")
    assert line.step(opt, slope=1.0) > 10
    chosen = opt.last.eps[0]
    assert line.step(opt, slope=0.0) == 2 and opt.signal.doubted
    state = opt.state_dict()
    assert line.step(opt, slope=1.0) == 4 and opt.last.eps[0] == chosen and not opt.signal.doubted
    resumed = SPSA([line.weight], lr=0, eps="auto")
    resumed.load_state_dict(state)
    assert resumed.signal.doubted


def test_a_flat_step_among_slopes_that_it_is_divided_by_is_no_reason_to_doubt(caplog: pytest.LogCaptureFixture) -> None:
    line = NoisyLine()
    opt = SPSA([line.weight], lr=0, eps="auto", second_moment_beta=0.9)
    line.step(opt, slope=1.0)
    with caplog.at_level(logging.WARNING, logger="zopro"):
        assert line.step(opt, slope=0.0) == 2 and opt.last.signal_to_noise < 3 and not opt.signal.doubted
    assert not caplog.records  # nor to warn
    opt.second_moment.mean_square = 0.0  # as after many flat steps
    assert line.step(opt, slope=0.0) == 2 and opt.signal.doubted


def test_an_eps_that_did_before_is_kept_where_nothing_speaks_against_it() -> None:
    line = NoisyLine()
    opt = SPSA([line.weight], lr=0, eps="auto")
    line.step(opt, slope=1.0)
    found, noise = opt.last.eps[0], opt.signal.noise_floor
    later = SPSA([line.weight], lr=0, eps="auto", eps_guess=3 * found)
    assert line.step(later, slope=1.0) == 11 + 2 and later.last.eps == [3 * found]
    assert noise / 4 < later.signal.noise_floor < 4 * noise and later.last.signal_to_noise > 3
    assert line.step(later, slope=1.0) == 2
    again = SPSA([line.weight], lr=0, eps="auto", eps_guess=1e4)
    again.step(lambda: line.weight.double().sum() - 1e5 * line.weight.double().sum() ** 3)
    assert again.last.eps[0] < 1e-2, "the slope is another one there"
    for guess in (0, -1.0, math.inf, "auto"):
        with pytest.raises(ValueError, match=r"eps_guess: must be None, or finite and above 0, got"):
            SPSA([line.weight], eps="auto", eps_guess=guess)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"second_moment_beta": 0.9}, 1.0),
        ({"second_moment_beta": 0.9, "queries": 4}, 0.5),
        ({"over_std": True, "sides": 1, "queries": 4}, 0.5),
        ({}, None),
    ],
)
def test_normalised_slopes_are_measured_over_the_length_of_a_step(options: dict[str, Any], share: float | None) -> None:
    line = NoisyLine()
    opt = SPSA([line.weight], lr=0.02, eps="auto", seed=3, **options)
    asked = line.step(opt, slope=1.0)
    assert (opt.last.eps == [0.02 * share] and asked <= 11 + 8) if share else opt.last.eps[0] < 0.02
    far = SPSA([line.weight], lr=1e4, eps="auto", **options)
    far.estimate(lambda: line.weight.double().sum() - 1e5 * line.weight.double().sum() ** 3)
    assert far.param_groups[0]["eps"] < 1e-2, "the slope is another one there"


def test_where_no_direction_slopes_a_look_takes_two_evaluations() -> None:
    weight = torch.zeros(4, requires_grad=True)
    draws, calls = torch.Generator().manual_seed(0), []

    def noise() -> torch.Tensor:
        calls.append(0)
        return 0 * weight.sum() + torch.randn((), generator=draws)

    opt = SPSA([weight], lr=0, eps="auto")
    opt.step(noise)
    assert opt.signal.blind
    calls.clear()
    for _ in range(40):
        opt.step(noise)
    extra = len(calls) - 2 * 40
    assert 0 < extra <= 2 * 6 + 45, "looks at 6 of them at most, and one search where noise passed for a slope"


def test_an_eps_of_a_flat_direction_shrinks_at_the_next_step() -> None:
    """The first batch says next to nothing, so that the search ends far away; the loss bends there."""
    weight = torch.zeros(50, requires_grad=True)
    gradient = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    height = 1e-5

    def closure() -> torch.Tensor:
        return torch.round(height * (gradient @ weight.double()) * 2**16) / 2**16

    opt = SPSA([weight], lr=0, eps="auto")
    opt.step(closure)
    blind = opt.last.eps[0]
    assert opt.last.signal_to_noise < 3 or math.isnan(opt.last.signal_to_noise)
    height = 1.0
    opt.step(closure)
    opt.step(closure)
    assert opt.last.eps[0] < blind and opt.last.signal_to_noise > 3


def test_a_state_of_the_first_release_can_be_gone_on_with() -> None:
    module, closure = mlp()
    opt = SPSA(trainable(module), lr=0, eps="auto")
    opt.step(closure)
    later = {"doubtful_steps", "patience", "doubted", "blind"}
    state = opt.state_dict()
    state["zeroth_order"] = {key: value for key, value in state["zeroth_order"].items() if key not in later}
    opt.load_state_dict(state)
    opt.step(closure)
    assert opt.signal.doubtful == 0 and not opt.signal.doubted
