"""Noise floor and eps: against losses whose rounding and curvature are known."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np
import pytest

from zopro.zo import auto_eps, noise_floor
from zopro.zo.eps import PROBES, TARGET_SIGNAL, holding_noise, loss_noise, search_eps


def noisy(function: Callable[[float], float], sigma: float, seed: int = 0) -> Callable[[float], float]:
    generator = random.Random(seed)
    return lambda t: function(t) + generator.gauss(0, sigma)


def rounded(function: Callable[[float], float], unit: float) -> Callable[[float], float]:
    return lambda t: round(function(t) / unit) * unit


def slope_error(function: Callable[[float], float], eps: float, sides: int = 2) -> float:
    """Relative error of the difference quotient against the true slope, taken very close to 0."""
    true = (function(1e-7) - function(-1e-7)) / 2e-7
    other = function(-eps) if sides == 2 else function(0)
    return abs((function(eps) - other) / (sides * eps) / true - 1)


@pytest.mark.parametrize("sigma", [1e-8, 1e-4, 10.0])
def test_noise_floor_finds_the_noise_on_a_smooth_function(sigma: float) -> None:
    """Differences cancel what is smooth: the estimate must not depend on the quadratic under the noise."""
    generator = random.Random(1)
    values = [2 + 30 * sigma * k + sigma * k * k + generator.gauss(0, sigma) for k in range(400)]
    assert noise_floor(values) == pytest.approx(sigma, rel=0.15)


def test_noise_floor_is_zero_without_noise_and_needs_enough_values() -> None:
    assert noise_floor([3.0 * k - k * k for k in range(7)]) == 0
    with pytest.raises(ValueError, match=r"values: need more than order = 3 of them, got 3"):
        noise_floor([1.0, 2.0, 3.0])


def test_seven_values_are_enough_for_the_order_of_magnitude() -> None:
    ratios = [loss_noise(noisy(lambda t: 5 + t, 1e-3, seed), 1e-3) / 1e-3 for seed in range(200)]
    assert 0.7 < sum(ratios) / len(ratios) < 1.1
    assert min(ratios) > 0.05 and max(ratios) < 3


@pytest.mark.parametrize("unit", [1e-6, 1e-4, 1e-2])
def test_a_loss_that_moves_in_steps_shows_its_step_as_noise(unit: float) -> None:
    """A bf16 loss near 4 comes in steps of 1/64: values at close points are all equal, which is not "no noise"."""
    sigma = loss_noise(rounded(lambda t: 4 + 2.7 * t + t * t, unit), eps=1e-5)
    assert unit / 12 < sigma < unit


def test_noise_is_never_below_single_precision_and_unknown_where_nothing_moves() -> None:
    assert loss_noise(lambda t: 8 + 1e-3 * t, 1e-3) == pytest.approx(8 * 2**-24)
    asked: list[float] = []
    assert math.isnan(loss_noise(lambda t: asked.append(t) or 8.0, 1e-3))  # type: ignore[func-returns-value]
    assert len(asked) == 3, "a step without advantages has hundreds of the like after it"
    assert math.isnan(loss_noise(lambda t: math.nan, 1e-3))


def test_the_paper_s_eps_is_all_rounding_where_auto_s_is_not() -> None:
    """A quadratic in steps of 2^-8: at eps = 1e-5 both sides are equal, at the chosen eps the slope is right."""

    def smooth(t: float) -> float:
        return 4 + 3 * t + 0.5 * t * t

    loss = rounded(smooth, 2**-8)
    assert loss(1e-5) == loss(-1e-5)
    eps, sigma = auto_eps(loss)
    assert (loss(eps) - loss(-eps)) / (2 * eps) == pytest.approx(3, rel=0.15)
    assert abs(loss(eps) - loss(-eps)) / (math.sqrt(2) * sigma) > 3


def test_more_noise_takes_a_larger_eps() -> None:
    chosen = [auto_eps(noisy(lambda t: 2 + t, sigma, seed=3))[0] for sigma in (1e-8, 1e-6, 1e-5, 1e-4, 1e-3)]
    assert chosen == sorted(chosen)
    assert chosen[0] < chosen[-1] / 100


def signal(sigma: float, eps: float) -> float:
    """Signal-to-noise ratio of a difference across a slope of 1."""
    return 2 * eps / (math.sqrt(2) * sigma)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [1e-8, 1e-6, 1e-5])
def test_eps_gives_the_signal_that_is_wanted_and_not_much_more(sigma: float, seed: int) -> None:
    eps, measured = auto_eps(noisy(lambda t: 2 + t, sigma, seed))
    assert signal(measured, eps) > 0.9 * TARGET_SIGNAL
    assert eps == PROBES[1] or signal(measured, eps / 3) < 1.1 * TARGET_SIGNAL


@pytest.mark.parametrize(("sigma", "curvature"), [(1e-4, 1e2), (1e-4, 1e3), (1e-5, 1e4)])
def test_eps_is_small_enough_for_a_cubic(sigma: float, curvature: float) -> None:
    """Noise asks for a large eps, the cubic for a small one: the slope must stay right within what they leave."""

    def cubic(t: float) -> float:
        return 2 + t + curvature * t**3

    def error(eps: float) -> float:
        return slope_error(cubic, eps) + 1 / signal(sigma, eps)

    errors = sorted(error(auto_eps(noisy(cubic, sigma, seed))[0]) for seed in range(21))
    assert errors[10] < 5 * min(error(probe) for probe in PROBES)
    assert errors[-1] < 0.6


def test_noise_that_is_alike_at_close_points_is_measured_where_eps_reaches() -> None:
    """A sum of rounded activations, as in bf16: hardly any rounds otherwise 1e-5 away, all of them 1e-2 away."""
    errors, noises, close = [], [], []
    for seed in range(20):
        generator = random.Random(seed)
        activations = [(generator.gauss(0, 1), generator.gauss(1, 3)) for _ in range(300)]

        def loss(t: float, activations: list[tuple[float, float]] = activations) -> float:
            return 2 + sum(round((a + b * t) * 64) / 64 for a, b in activations) / 300

        eps, sigma = auto_eps(loss)
        slope = sum(b for _, b in activations) / 300
        errors.append(abs((loss(eps) - loss(-eps)) / (2 * eps) / slope - 1))
        noises.append(sigma)
        close.append(noise_floor([loss(k * 1e-5) for k in range(7)]))
    assert sorted(errors)[18] < 0.1, "one unlucky direction of twenty is allowed"
    assert 2e-4 < sorted(noises)[10] < 6e-4, "1/64 / sqrt(12) / sqrt(300) = 2.6e-4"
    assert sorted(close)[10] < 1e-4


def test_curvature_bends_forward_differences_only() -> None:
    def quadratic(t: float) -> float:
        return 2 + t + 100 * t * t

    central, _ = auto_eps(noisy(quadratic, 3.6e-5))
    forward, _ = auto_eps(noisy(quadratic, 3.6e-5), sides=1)
    assert forward < central
    assert slope_error(quadratic, forward, sides=1) < 0.3 < slope_error(quadratic, central, sides=1)
    assert slope_error(quadratic, central) < 0.01


@pytest.mark.parametrize("scale", [1e-4, 1.0, 50.0])
def test_eps_is_in_units_of_the_direction(scale: float) -> None:
    assert auto_eps(lambda t: 2 + t * scale, scale)[0] == pytest.approx(auto_eps(lambda t: 2 + t)[0] / scale)


@pytest.mark.parametrize("steepness", [30.0, 1e3, 2e4, 1e5])
def test_eps_stays_within_the_clip_range(steepness: float) -> None:
    """Along a policy's previous update RLOO's ratios left [0.8, 1.2] within 1e-4 (steepness 2e3)."""
    generator = random.Random(0)
    rows = [(generator.gauss(0, 1), steepness * generator.gauss(0, 1)) for _ in range(16)]  # advantage, slope

    def surrogate(t: float) -> float:
        ratios = [(advantage, math.exp(min(slope * t, 50.0))) for advantage, slope in rows]
        return -sum(min(ratio * a, min(max(ratio, 0.8), 1.2) * a) for a, ratio in ratios) / len(rows)

    eps, _ = auto_eps(noisy(surrogate, 1e-6, seed=1))
    measured = (surrogate(eps) - surrogate(-eps)) / (2 * eps)
    assert measured == pytest.approx(-sum(a * slope for a, slope in rows) / len(rows), rel=0.1)


@pytest.mark.parametrize("sigma", [1e-7, 1e-4, 1e-2])
def test_a_direction_that_happens_to_be_flat_does_not_take_eps_to_where_the_loss_bends(sigma: float) -> None:
    """A 270M model in bfloat16: noise 0.01, answers' log-probs collapse by nats beyond 1e-3 of root mean square."""

    def loss(t: float) -> float:
        return t + min((t * 1e3) ** 2, 50.0)

    eps, _ = auto_eps(noisy(loss, sigma, seed=2))
    assert eps < 3e-3 and (eps * 1e3) ** 2 < max(3e-3, 300 * sigma)


@pytest.mark.parametrize("reach", [1e-3, 1e-2, 1.0])
def test_a_slope_that_nothing_shows_takes_the_largest_eps_at_which_nothing_bends(reach: float) -> None:
    """The estimate's noise falls with eps, and other directions may slope more; beyond `reach` the model breaks."""

    def loss(t: float) -> float:
        return 1e-3 * t + min((t / reach) ** 2, 50.0)

    eps, sigma = auto_eps(noisy(loss, 0.01, seed=4))
    assert 0.002 < sigma < 0.05
    assert 0.02 < eps / reach < 0.3, "where (t / reach)^2 is hidden by the noise, and not far below"
    assert auto_eps(noisy(lambda t: 1e-3 * t, 0.01, seed=4))[0] == PROBES[-1]


# Of the demo's model in bfloat16 along its previous update: a slope of -570, and from 0.02 on broken answers.
CLIFF = {
    -0.1968: -21.36, -0.1312: -22.19, -0.06561: -20.31, -0.04374: 5.200, -0.02187: 4.179, -0.01458: 4.263,
    -7.29e-3: 3.003, -4.86e-3: 2.257, -2.43e-3: 1.264, -1.62e-3: 0.842, -8.1e-4: 0.469, -5.4e-4: 0.311, -2.7e-4: 0.199,
    -1.8e-4: 0.151, -9e-5: 0.0585, -6e-5: 0.0477, -3e-5: 0.0454, -1.11e-6: 0.0031, -7.4e-7: 0.0016, -3.7e-7: 0.0104,
    -1.23e-7: 0.0257, -8.2e-8: 0.0228, -4.1e-8: 0.0248, 0.0: 0.0111, 4.1e-8: 0.0159, 8.2e-8: 0.0220, 1.23e-7: 0.0218,
    3.7e-7: 0.0251, 7.4e-7: -0.0085, 1.11e-6: 0.0010, 3e-5: 0.0390, 6e-5: -0.0295, 9e-5: -0.0405, 1.8e-4: -0.0716,
    2.7e-4: -0.1283, 5.4e-4: -0.277, 8.1e-4: -0.477, 1.62e-3: -0.974, 2.43e-3: -1.502, 4.86e-3: -3.233, 7.29e-3: -4.261,
    0.01458: -5.915, 0.02187: -25.68, 0.04374: -25.79, 0.06561: -23.08, 0.1312: -21.31, 0.1968: -21.14,
}  # fmt: skip


def test_a_cliff_is_not_taken_for_noise_that_hides_the_slope() -> None:
    """Third differences across a cliff are large: once that noise hid the slope, eps went on to 0.2."""
    eps, sigma = auto_eps(lambda t: float(np.interp(t, list(CLIFF), list(CLIFF.values()))))
    assert 5e-4 < eps < 8e-3 and sigma < 0.2


def close_points_round_alike(fluke: float, seed: int, sigma: float = 0.007) -> Callable[[float], float]:
    """As measured in bfloat16 on a 135M model: noise, but points so close that few round otherwise seem a line."""
    noise, slope = random.Random(seed), 0.65

    def loss(t: float) -> float:
        if abs(t) < 2e-6:
            return fluke * (t / 1e-6 + noise.gauss(0, 1 / 30))
        return slope * t + noise.gauss(0, sigma)

    return loss


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("fluke", [1e-4, -1e-3])
def test_a_slope_that_rounding_shows_at_close_points_is_taken_back(fluke: float, sides: int) -> None:
    found = [auto_eps(close_points_round_alike(fluke, seed), sides=sides) for seed in range(50)]
    assert sum(eps > 0.02 and 0.003 < sigma < 0.02 for eps, sigma in found) >= 43  # noise decides the others


def test_a_candidate_whose_slope_is_hidden_costs_two_losses() -> None:
    """Seven at the first candidate, three for all of the loss and its far ends, the rest only where a slope shows."""
    asked: list[float] = []
    hidden = noisy(lambda t: 1e-3 * t, 0.01, seed=4)

    def loss(t: float) -> float:
        asked.append(t)
        return hidden(t)

    eps, sigma, seen = search_eps(loss)
    assert (eps, seen) == (PROBES[-1], False) and 0.003 < sigma < 0.03
    assert len(asked) <= 3 + 7 + 2 * 6 + 4


def test_an_eps_holds_where_the_slope_is_the_one_nearer_by_or_none_shows() -> None:
    for slope in (1.0, 0.0):
        held = [holding_noise(noisy(lambda t, slope=slope: 2 + slope * t, 1e-4, seed), 0.01) for seed in range(50)]
        assert sum(2e-5 < noise < 4e-4 for noise in held) >= 47


@pytest.mark.parametrize(
    ("loss", "sides"),
    [
        (lambda t: t + 1e4 * t**3, 2),
        (lambda t: t + 100 * t * t, 1),
        (lambda t: t if t < 5e-3 else math.inf, 2),
        (lambda t: 1.5, 2),
        *((lambda t, far=far: float(np.interp(far * t, list(CLIFF), list(CLIFF.values()))), 2) for far in range(1, 9)),
    ],
)
def test_an_eps_does_not_hold(loss: Callable[[float], float], sides: int) -> None:
    assert math.isnan(holding_noise(loss, 0.01, sides))


def test_a_search_that_begins_somewhere_leaves_out_what_is_nearer_unless_the_beginning_breaks() -> None:
    asked: list[float] = []

    def loss(t: float) -> float:
        asked.append(abs(t))
        return hidden(t)

    hidden = noisy(lambda t: t, 1e-3, seed=4)
    eps, _, seen = search_eps(loss, begin=2.43e-3)
    assert seen and eps > 0.02 and min(filter(None, asked)) > 2e-4 and len(asked) < 30
    hidden = noisy(lambda t: t + (20 * t) ** 3, 1e-6)
    assert search_eps(loss, begin=0.1)[0] == pytest.approx(search_eps(loss)[0], rel=10) and search_eps(loss)[0] < 0.01


def test_flat_and_broken_losses_do_not_crash() -> None:
    eps, sigma = auto_eps(lambda t: 1.5)
    assert eps == PROBES[-1] and math.isnan(sigma), "constant: any eps does, and the noise is unknown"
    assert all(math.isnan(value) for value in auto_eps(lambda t: math.nan))
    assert all(math.isnan(value) for value in auto_eps(lambda t: math.inf))
    eps, _ = auto_eps(lambda t: 3 + 1e-4 * t if abs(t) < 2e-3 else math.inf)
    assert 5e-4 <= eps < 2e-3, "a candidate where the loss overflows is unfit"


@pytest.mark.parametrize("sides", [1, 2])
def test_a_loss_of_exactly_zero_nearby_divides_by_nothing(sides: int) -> None:
    """Log-ratios of a float32 model do not change at all until eps stands above the rounding."""
    eps, _ = auto_eps(lambda t: 0.0 if abs(t) < 1e-5 else t, sides=sides)
    assert eps > 1e-5
    _, sigma = auto_eps(lambda t: 0.0 if abs(t) < 1e-5 else t * t * 1e9, sides=sides)
    assert math.isnan(sigma) or sigma > 0
