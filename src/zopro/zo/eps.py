"""eps, the distance of the evaluations, chosen from the noise floor of the loss.

At eps = 1e-5 in bf16 nearly all of L+ - L- is rounding. `noise_floor` measures that rounding and `auto_eps` chooses the
perturbation from it, so that a projected gradient means something.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

# eps candidates (to 0.2) for directions of root mean square 1. Along a policy's previous update the clip range of RLOO
# can be left within 3e-5 (measured on a 270M model), so they begin far below it; along B of two matrices a block slopes
# stood above bfloat16's rounding from 0.07 on (135M).
PROBES = tuple(3e-5 * 3**k for k in range(-5, 9))
LONGEST_SKIP = 4  # candidates passed over at most where rounding hides the slope
NOISE_POINTS = 7
ENDS = (-3, 0, 3)  # of these points, in thirds of eps: what a slope takes, and how the loss bends
NOISE_ORDER = 3  # third differences cancel the smooth part up to its quadratic term
FLOAT32_ROUNDING = 2**-24  # relative; a loss of fp32 numbers is not known better than this
LOW_SIGNAL = 3.0  # signal-to-noise ratio under which a difference of losses is mostly rounding
KNOWN_SIGNAL = 10.0  # above which a slope is known well enough for another one to disagree with it
TARGET_SIGNAL = 100.0  # signal-to-noise ratio at which rounding no longer matters
# In noise floors. L+ + L- - 2 L(theta) has a rounding of sqrt(6) of them, and is 4 where all but theta is broken.
SEEN_BEND = 3.9
GROWN_NOISE = 10.0  # times the noise within a third of the distance: more is a cliff


def noise_floor(values: Sequence[float], order: int = NOISE_ORDER) -> float:
    """Standard deviation of the rounding noise in function values at equally spaced, close points.

    Difference-table estimate of Hamming, used by ECnoise (More and Wild 2011, "Estimating computational noise"):
    sigma^2 = (k!)^2 / (2k)! * mean of squared k-th differences.

    Raises:
        ValueError: fewer than `order` + 1 values.

    >>> noise_floor([1.0, 2.0, 4.0, 7.0, 11.0])  # a parabola has none
    0.0
    >>> round(noise_floor([0.1, -0.1] * 8), 2)
    0.18
    """
    if len(values) <= order:
        raise ValueError(f"values: need more than order = {order} of them, got {len(values)}")
    differences = list(values)
    for _ in range(order):
        differences = [b - a for a, b in pairwise(differences)]
    mean_square = sum(x * x for x in differences) / len(differences)
    return math.sqrt(mean_square * math.factorial(order) ** 2 / math.factorial(2 * order))


def loss_noise(loss_at: Callable[[float], float], eps: float, scale: float = 1.0) -> float:
    """Standard deviation of the rounding in one loss value across +-eps, from 10 evaluations at least.

    Rounding inside the model is alike at close points, so it is measured at the distances that eps spans. Where the
    losses there are mostly equal, eps is below their resolution, and wider spans follow.

    Args:
        loss_at: t -> L(theta + t z).
        eps: the perturbation in use, in units of t.
        scale: root mean square of z's entries.

    Returns:
        sigma, at least the rounding of an fp32 number of the loss's size; NaN if a loss was not finite, or if the loss
        is constant (RLOO where all advantages are 0), which says nothing about its rounding elsewhere.
    """
    if _constant(loss_at, PROBES[-1] / scale, loss_at(0.0)):
        return math.nan
    sigma, losses = 0.0, _Losses(loss_at, eps)
    for exponent in range(math.ceil(math.log(max(1.0, PROBES[-1] / scale / eps), 3)) + 1):
        values = losses.across(exponent)
        if not all(math.isfinite(value) for value in values):
            return math.nan
        sigma = max(sigma, noise_floor(values))
        if len(set(values)) > NOISE_POINTS // 2:
            return max(sigma, _float32_rounding(values))
    return sigma or math.nan


def auto_eps(loss_at: Callable[[float], float], scale: float = 1.0, sides: int = 2) -> tuple[float, float]:
    """Choose eps for differences along one direction; return (eps, noise floor of the loss).

    Goes from the smallest candidate to larger ones until the difference stands `TARGET_SIGNAL` times above the noise
    floor at its distance and the slope agrees with the candidate's before, or until it no longer does (within 10 % and
    what the noise explains) or, two having agreed, stands less clear of the noise than they did: a larger eps than needed
    only bends away from the slope, all the more where the loss is clipped, and a cliff passes for noise. It also ends
    where the loss bends clearly more than it slopes: along a direction that happens to be flat no eps shows a slope, and
    the search would otherwise go on to where the model is no longer itself. Close points round alike, so a slope seen
    there can be rounding: it is taken back where the noise at the next candidate explains both.

    Args:
        loss_at: t -> L(theta + t z).
        scale: root mean square of z's entries; the candidates are `PROBES` divided by it.
        sides: 2 for central differences, 1 for forward differences, which curvature bends too.

    Returns:
        eps, and sigma, the standard deviation of one loss value. A candidate whose losses are not finite is unfit.
        Where rounding hides the slope at every candidate, the largest one tried at which it hides how the loss bends too:
        there the model is still itself, and other directions may slope more.
        (largest candidate, NaN) if the loss is constant between the largest candidates: any eps does, ask again with
        another batch or direction. (NaN, NaN) if the loss near theta is not finite.

    >>> eps, noise = auto_eps(lambda t: 1.0 + 2.0 * t)  # a line: no eps bends away from its slope
    >>> eps < 1e-5, noise < 1e-6  # so the smallest eps that shows it above the rounding of fp32 will do
    (True, True)
    """
    return search_eps(loss_at, scale, sides)[:2]


def _constant(loss_at: Callable[[float], float], largest: float, at_theta: float) -> bool:
    """Whether the loss is the same at theta and at the largest candidates on either side: RLOO's without advantages."""
    return math.isfinite(at_theta) and loss_at(-largest) == at_theta == loss_at(largest)


def holding_noise(loss_at: Callable[[float], float], eps: float, sides: int = 2) -> float:
    """The noise floor across +-eps where nothing speaks against an eps that did before, from 11 evaluations; else NaN.

    Against it speak losses that are not finite or all equal, a slope that is not the one within a third of eps (by more
    than a tenth and what the noise there explains), and noise that grows tenfold on the way. That no slope shows does
    not: this direction may be flat, and the next one slope.

    >>> holding_noise(lambda t: 1.0 + 2.0 * t, 1e-3) < 1e-6, holding_noise(lambda t: t + (30 * t) ** 3, 1e-1)
    (True, nan)
    """
    losses = _Losses(loss_at, eps / 3)
    near, far = losses.across(0), losses.across(1)
    if not all(math.isfinite(value) for value in (*near, *far)) or len(set(far)) == 1:
        return math.nan
    close, noise = _noise(near), max(_noise(near), _noise(far))
    inner, outer = (
        (values[-1] - values[0 if sides == 2 else len(values) // 2]) / (sides * width)
        for values, width in ((near, eps / 3), (far, eps))
    )
    agree = abs(outer - inner) <= 0.1 * abs(outer) + 6 * close / (sides * eps / 3)
    return noise if agree and noise <= GROWN_NOISE * close else math.nan


def search_eps(
    loss_at: Callable[[float], float], scale: float = 1.0, sides: int = 2, begin: float | None = None
) -> tuple[float, float, bool]:
    """`auto_eps`, and whether a slope shows at its eps, ten times above its noise at least.

    Args:
        begin: an eps that is to be improved on. If it holds (`holding_noise`), no candidate under a third of it is tried.
            Where no candidate shows a slope, what is returned is the last one tried.
    """
    chosen, slope, sigma, signal = math.nan, math.nan, math.nan, 0.0
    known = borne_out = False  # whether the slope at the candidate before stands clear, and whether two such slopes agree
    losses, first = _Losses(loss_at, PROBES[0] / scale), 0
    if begin is not None:
        nearest = min(max(1, round(math.log(begin * scale / PROBES[0], 3))), len(PROBES) - 1)
        first = 0 if math.isnan(holding_noise(losses.at, PROBES[nearest] / scale, sides)) else nearest - 1
    if first == 0 and _constant(losses.at, largest := PROBES[-1] / scale, losses.at(0.0)):
        return largest, math.nan, False
    last = first  # the last candidate that was fit
    exponent, skip, longest = first, 1, LONGEST_SKIP
    while exponent < len(PROBES):
        eps, noise, values = PROBES[exponent] / scale, sigma, losses.across(exponent, ENDS)
        if math.isnan(sigma) or known or _stands_out(values, sigma):
            values = losses.across(exponent)
            noise = _noise(values)
            if not math.isnan(sigma):  # fewer roundings change at close points: noise only grows with the distance
                noise = max(noise, sigma)
        lower, middle, upper = values[0], values[len(values) // 2], values[-1]
        bends = not math.isnan(chosen) and _bend(values) > max(abs(upper - lower), 2 * KNOWN_SIGNAL * noise)
        if bends or not all(math.isfinite(value) for value in values):
            if skip == 1:
                break
            exponent, skip, longest = exponent - skip + 1, 1, 1  # the candidates passed over may be fit
            continue
        difference = upper - (lower if sides == 2 else middle)
        new_slope = difference / (sides * eps)
        explained = 0.1 * abs(slope) + 12 * sigma / (sides * chosen)
        fades = borne_out and abs(difference) < signal * math.sqrt(2) * noise
        clear = max(abs(slope * sides * chosen), abs(difference)) > KNOWN_SIGNAL * math.sqrt(2) * noise
        if known and clear and (fades or abs(new_slope - slope) > explained):
            break
        borne_out = known and abs(new_slope - slope) <= explained / 4
        chosen, slope, sigma, last = eps, new_slope, noise, exponent
        signal = abs(difference) / (math.sqrt(2) * sigma) if sigma > 0 else 0.0  # all losses 0: too near to differ
        if known and signal >= TARGET_SIGNAL:
            break
        known = signal >= KNOWN_SIGNAL
        wanted = math.log(KNOWN_SIGNAL / max(signal, 1e-3), 3)  # further candidates until the slope shows
        skip = min(max(1, int(wanted)), longest, max(1, len(PROBES) - 1 - exponent))
        exponent += skip
    if known or math.isnan(chosen) or begin is not None:
        return chosen, sigma or math.nan, known
    while True:  # the last candidate and smaller ones, until rounding hides how the loss bends
        values = losses.across(last)
        noise = max(_noise(losses.across(first)), noise_floor(values))
        if last == first or _bend(values) <= SEEN_BEND * noise:
            return PROBES[last] / scale, noise or math.nan, False
        last -= 1


def _bend(values: Sequence[float]) -> float:
    """|L+ + L- - 2 L(theta)|."""
    return abs(values[-1] + values[0] - 2 * values[len(values) // 2])


def _stands_out(values: Sequence[float], sigma: float) -> bool:
    """Whether losses at -eps, 0 and eps slope or bend more than rounding of `sigma` may explain, or are not finite."""
    lower, middle, upper = values
    sloped = max(abs(upper - middle), abs(upper - lower)) / math.sqrt(2)  # one-sided, and central
    return not max(sloped, _bend(values) / 2) < KNOWN_SIGNAL * sigma


class _Losses:
    """Losses at multiples of unit / 3, each evaluated once."""

    def __init__(self, loss_at: Callable[[float], float], unit: float) -> None:
        self.loss_at, self.unit = loss_at, unit
        self.known: dict[int, float] = {}

    def across(self, exponent: int, thirds: Iterable[int] = range(-3, 4)) -> list[float]:
        """Losses at seven even points across +-eps, eps = 3^exponent unit, or at some of them."""
        return [self._at(k * 3**exponent) for k in thirds]

    def at(self, t: float) -> float:
        """The loss at one of these points, by its distance."""
        return self._at(round(3 * t / self.unit))

    def _at(self, thirds: int) -> float:
        if thirds not in self.known:
            self.known[thirds] = self.loss_at(thirds * self.unit / 3)
        return self.known[thirds]


def _noise(values: Sequence[float]) -> float:
    return max(noise_floor(values), _float32_rounding(values))


def _float32_rounding(values: Sequence[float]) -> float:
    return FLOAT32_ROUNDING * max(abs(value) for value in values)
