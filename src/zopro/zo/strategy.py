"""What a step asks and what it makes of the answers: displacements out, numbers in, a record to be applied.

A strategy holds no tensor and no model. It names displaced policies, is told one number for each (a loss, a reward), and
says in a `StepRecord` where theta goes. So the same strategy drives a model in this process, a GPU engine or a server.
SPSA is the first: the projected gradient along z is g = (L(theta + eps z) - L(theta - eps z)) / (2 eps) two-sided and
(L(theta + eps z) - L(theta)) / eps one-sided (Spall 1992; Malladi et al. 2023; Galatolo et al. 2025).

    strategy = SPSAStrategy(lr=1e-2, eps=1e-3)
    for step in range(100):
        at = strategy.ask(step)
        record = strategy.tell([loss(weights.at(displacement)) for displacement in at])
        weights.apply(record)
"""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from zopro.zo.displacement import Displacement, Values
from zopro.zo.eps import LOW_SIGNAL, holding_noise, loss_noise, search_eps
from zopro.zo.groups import Group, check_guess, check_seed
from zopro.zo.monitor import SecondMoment, SignalMonitor
from zopro.zo.records import Accumulated, Estimate, StepRecord

logger = logging.getLogger(__name__)

KNOWN_LOSS_TOLERANCE = 0.1  # of the difference L(theta + eps z) - L(theta)


class Strategy(Protocol):
    """One way to find out where theta should go."""

    def ask(self, step: int) -> list[Displacement]:
        """The displacements of a step, which an engine gets in one call."""

    def tell(self, values: Sequence[float]) -> StepRecord:
        """What the step does, of one value for each displacement that was asked for, in their order."""


class SPSAStrategy:
    """Differences of losses along random directions, two-sided or one-sided.

    Args:
        lr, eps, weight_decay: of the one parameter group, as `zopro.SPSA` has them.
        queries, sides, seed, second_moment_beta, measure_noise: as `zopro.SPSA` has them.
        over_std: divide the step by the standard deviation of the one-sided slopes, as FZOO (Dang et al. 2025, arXiv
            2506.09034) does: theta <- theta - lr / (N s) sum_i g_i z_i. Their step is over the deviation of the losses,
            s eps, so that our lr is their eta / eps: the length of a step does not depend on eps.
        eps_guess: with eps "auto" an eps that did before, such as the last one of an earlier training; by default, where
            slopes are normalised, the length of a step. It is kept if 11 losses do not speak against it, in place of
            a search by up to 45.
        groups: in place of the one group: dicts with lr, eps, weight_decay and auto_eps, read at each step. Theirs is the
            eps that `calibrate` chooses.

    Raises ValueError: an argument out of range.

    >>> strategy = SPSAStrategy(lr=0.1, eps=0.5)
    >>> [displacement.t for displacement in strategy.ask(0)]
    [1.0, -1.0]
    >>> strategy.tell([3.0, 1.0]).projected_gradients  # (3 - 1) / (2 eps)
    [2.0]
    """

    needs = frozenset(("noise_floor", "mean_square"))  # what every version's state has, and no other strategy's

    def __init__(
        self,
        lr: float = 1e-3,
        eps: float | str = 1e-3,
        weight_decay: float = 0.0,
        *,
        queries: int = 1,
        sides: int = 2,
        seed: int = 0,
        second_moment_beta: float | None = None,
        measure_noise: bool = False,
        over_std: bool = False,
        eps_guess: float | None = None,
        groups: list[Group] | None = None,
    ) -> None:
        if not hasattr(queries, "__index__") or queries < 1:
            raise ValueError(f"queries: must be a whole number of at least 1, got {queries!r}")
        check_seed(seed)
        if sides not in (1, 2):
            raise ValueError(f"sides: must be 1 or 2, got {sides}")
        if second_moment_beta is not None and not 0 <= second_moment_beta < 1:
            raise ValueError(f"second_moment_beta: must lie in [0, 1), got {second_moment_beta}")
        if over_std and (sides != 1 or queries < 2):
            raise ValueError(f"over_std: must have sides=1 and at least 2 queries, got {sides=}, {queries=}")
        if over_std and second_moment_beta is not None:
            raise ValueError(
                f"second_moment_beta: must be None with over_std, which normalises as well, got {second_moment_beta}"
            )
        check_guess("eps_guess", eps_guess)
        one = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "auto_eps": eps == "auto"}
        self.groups: list[Group] = [one] if groups is None else groups
        self.queries, self.sides, self.seed, self.measure_noise = queries, sides, seed, measure_noise
        self.over_std, self.eps_guess = over_std, eps_guess
        self.signal = SignalMonitor()
        self.second_moment = SecondMoment(second_moment_beta)
        self.skipped_steps = 0
        self.trusts_known_loss: bool | None = None  # of L(theta) given to `ask`; None: not compared yet
        self.calibrating = False  # whether losses are asked for to choose eps, and not for a step
        self._accumulated = Accumulated()
        self._step, self._asked = -1, 0
        self._known: float | None = None

    def calibrate(self, step: int, values: Values, scale: Callable[[Displacement], float]) -> None:
        """Choose the eps that is "auto", and measure the noise floor, where either is wanted and not known yet.

        Where the loss is constant or not finite nothing can be measured, and the next step tries again. A chosen eps that
        is doubted (`SignalMonitor.watch`) is first looked at along this step's direction, and chosen anew where it is too
        small to show a slope, or was chosen where none showed and may be too large. A direction that shows none then
        leaves it as it is.

        Args:
            values: losses, asked for one at a time along the step's first direction.
            scale: root mean square of a displacement's entries (`Weights.scale`).
        """
        if self.uncalibrated:
            self.calibrating = True
            try:
                self._calibrate(step, values, scale)
            finally:
                self.calibrating = False

    def _calibrate(self, step: int, values: Values, scale: Callable[[Displacement], float]) -> None:
        unit = Displacement(self.seed, 0, step, 1.0, (1.0,) * len(self.groups))

        def loss_at(t: float) -> float:
            return values([dataclasses.replace(unit, t=t)])[0]

        automatic, signal = [group for group in self.groups if group["auto_eps"]], self.signal
        if not automatic:
            signal.noise_floor = loss_noise(loss_at, self.groups[0]["eps"], scale(unit))
            return
        anew, signal.doubted = signal.doubted and self.calibrated, False
        if anew:
            chosen = automatic[0]["eps"]
            shows = signal.ratio(loss_at(chosen) - loss_at(-chosen)) >= LOW_SIGNAL
            if shows is not signal.blind:
                return
            eps, noise, seen = search_eps(loss_at, scale(unit), self.sides, chosen)
            if not seen:
                return
            self.trusts_known_loss = None
        elif (guess := self.eps_guess or self._typical_step) and not math.isnan(
            noise := holding_noise(loss_at, guess, self.sides)
        ):
            eps, seen = float(guess), True
        else:
            eps, noise, seen = search_eps(loss_at, scale(unit), self.sides)
        signal.noise_floor, signal.blind = noise, not seen and not math.isnan(noise)
        for group in [] if math.isnan(eps) else automatic:
            group["eps"] = eps
        logger.info("noise floor of the loss %.3g, eps %.3g", noise, eps)

    def ask(self, step: int, loss_at_theta: float | None = None) -> list[Displacement]:
        """+eps and -eps of each query; one-sided theta and +eps of each. Empty where eps is "auto" and not chosen.

        Args:
            loss_at_theta: L(theta), where it is known without an evaluation. Used one-sided only, in place of asking,
                and only if it agrees with what was told of the first batch that shows slopes, which it must not move by
                more than a tenth.
        """
        self._step, self._known = step, loss_at_theta if self.sides == 1 else None
        plus = [self._at(step, query, 1.0) for query in range(self.queries)] if self.calibrated else []
        if self.sides == 2:
            at = [side for displacement in plus for side in (displacement, displacement.mirrored)]
        else:
            at = plus if self._trusted or not plus else [self._at(step, 0, 0.0), *plus]
        self._asked = len(at)
        return at

    def tell(self, values: Sequence[float]) -> StepRecord:
        """The step of the loss at each displacement that was asked for. Raises ValueError for more or fewer."""
        self.accumulate(self.estimate(values))
        return self.conclude(self._step)

    def first(self, step: int) -> Displacement:
        """theta + eps z of the step's first query."""
        return self._at(step, 0, 1.0)

    def estimate(self, values: Sequence[float]) -> Estimate:
        """Differences of losses, which times 1 / eps are slopes, of the values at what was asked for last.

        Raises ValueError: not one value for each displacement.
        """
        if len(values) != self._asked:
            raise ValueError(f"values: must be one for each of {self._asked} displacements, got {len(values)}")
        if not values:
            return Estimate([(math.nan, math.nan)] * self.queries, [math.nan] * self.queries)
        if self.sides == 2:
            pairs = list(zip(values[0::2], values[1::2], strict=True))
            return Estimate(pairs, [(plus - minus) / 2 for plus, minus in pairs])
        if self._trusted:
            assert self._known is not None
            at_theta, others = self._known, list(values)
        else:
            at_theta, *others = values
            if self._known is not None and self.trusts_known_loss is None:
                slopes = sum(abs(plus - at_theta) for plus in others) / len(others)
                if slopes > 0:  # a flat batch, or one of NaN, says nothing
                    self.trusts_known_loss = abs(self._known - at_theta) <= KNOWN_LOSS_TOLERANCE * slopes
        return Estimate([(plus, at_theta) for plus in others], [plus - at_theta for plus in others])

    def accumulate(self, estimate: Estimate, weight: float = 1.0) -> None:
        """Add one micro-batch's estimate to the coming step. All micro-batches of a step share its directions."""
        self._accumulated.add(estimate, weight)

    def forget(self) -> None:
        """Drop what was accumulated."""
        self._accumulated = Accumulated()

    def conclude(self, step: int, mean: bool = True) -> StepRecord:
        """The step, of what was accumulated.

        Args:
            mean: over micro-batches; False: their sum, where their weights already normalise them.

        Raises:
            RuntimeError: nothing was accumulated.
        """
        total, self._accumulated = self._accumulated, Accumulated()
        if not total.count:
            raise RuntimeError("apply: nothing to apply, call estimate(closure) first or pass a closure to step")
        normaliser = (mean and total.weight) or 1.0  # without any weight there is nothing to divide
        eps = [math.nan if group["eps"] == "auto" else float(group["eps"]) for group in self.groups]
        gradients = [difference / normaliser / eps[0] for difference in total.differences]
        finite = total.finite and all(math.isfinite(g) for g in gradients)
        if finite:
            scale = self.second_moment.root(gradients) * (statistics.stdev(gradients) or 1.0 if self.over_std else 1.0)
            coefficients = [g / scale / self.queries for g in gradients]
        else:
            coefficients = [0.0] * self.queries
            self.skipped_steps += 1
            logger.warning("step %d skipped: the loss was not finite (%d so far)", step, self.skipped_steps)
        record = StepRecord(
            step=step,
            seed=self.seed,
            projected_gradients=gradients,
            coefficients=coefficients,
            learning_rates=[float(group["lr"]) for group in self.groups],
            eps=eps,
            weight_decay=[float(group["weight_decay"]) for group in self.groups],
            loss=total.loss / normaliser,
            signal_to_noise=self.signal.ratio(total.signal),
            skipped=not finite,
            left_out=sorted(total.left_out),
        )
        typical = self.signal.ratio(self.second_moment.typical * eps[0] * self.sides)
        self.signal.watch(step, record.signal_to_noise, typical, any(group["auto_eps"] for group in self.groups))
        return record

    def state(self) -> dict[str, Any]:
        """What goes on with a run, beside its options."""
        return {
            "skipped_steps": self.skipped_steps,
            "seed": self.seed,
            "mean_square": self.second_moment.mean_square,
            "moment_weight": self.second_moment.weight,
            "trusts_known_loss": self.trusts_known_loss,
            **self.signal.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.skipped_steps, self.seed = state["skipped_steps"], state["seed"]
        self.signal.load(state)
        self.trusts_known_loss = state["trusts_known_loss"]
        self.second_moment.mean_square, self.second_moment.weight = state["mean_square"], state["moment_weight"]

    @property
    def uncalibrated(self) -> bool:
        """Whether the next step evaluates losses to choose eps, or to measure the noise floor."""
        wanted = self.measure_noise or any(group["auto_eps"] for group in self.groups)
        return wanted and (math.isnan(self.signal.noise_floor) or self.signal.doubted or not self.calibrated)

    @property
    def calibrated(self) -> bool:
        """Whether every group's eps is a number."""
        return all(group["eps"] != "auto" for group in self.groups)

    @property
    def _typical_step(self) -> float:
        """How far a step goes along its directions, in units of eps, if its slopes are normalised; else 0, not known."""
        if self.second_moment.beta is None and not self.over_std:
            return 0.0
        return max(float(group["lr"]) for group in self.groups) / math.sqrt(self.queries)

    @property
    def _trusted(self) -> bool:
        return self._known is not None and bool(self.trusts_known_loss)

    def _at(self, step: int, query: int, t: float) -> Displacement:
        return Displacement(self.seed, query, step, t, tuple(float(group["eps"]) for group in self.groups))
