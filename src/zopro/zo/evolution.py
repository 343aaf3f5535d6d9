"""Evolution strategies as a strategy: a population is displaced, its rewards are all that a step is made of.

With P members theta + s_m eps z_m (antithetic: s_m = +-1 of P / 2 directions) and F_m the shaped mean reward of a member,

    theta <- theta + lr / (P eps) sum_m F_m s_m z_m

(Salimans et al. 2017, arXiv 1703.03864; for language models Qiu et al. 2025, "Evolution strategies at scale", arXiv
2509.24372). No likelihood, no reference policy, nothing that could be differentiated.

    strategy = ESStrategy(lr=1e-3, sigma=1e-2, population=32)
    at = strategy.ask(step=0)
    record = strategy.tell([[reward(answer) for answer in answers] for answers in engine.sample(prompts, 1, options, at)])
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zopro.choices import SHAPINGS
from zopro.zo import shaping as shapes
from zopro.zo import sigma as sigmas
from zopro.zo.displacement import Displacement
from zopro.zo.groups import Group, check_guess, check_seed, number
from zopro.zo.records import StepRecord

logger = logging.getLogger(__name__)

Rewards = Sequence[float | None] | Sequence[Sequence[float | None]] | Tensor
"""One for each member, or for each member one for each prompt. None or NaN where there is none."""


class ESStrategy:
    """A population around theta, weighed by its rewards, of which more is better.

    Args:
        lr, sigma, weight_decay: of the one parameter group. sigma is eps, the scale of the displacements; "auto" begins
            at 0.01 and goes where members' rewards tell them apart (`zopro.zo.sigma`), which takes rewards per prompt.
        population: members, P; even if they are antithetic.
        antithetic: each direction is taken both ways, so that what is even in it cancels.
        shaping: what the population's mean rewards become, a name in `zopro.choices.SHAPINGS`.
        normalize: scale the sum over members so that its entries have root mean square 1, for directions of root mean
            square 1: lr is then the change of a weight in a step, whatever P and sigma are. Not the papers'.
        momentum, second_moment: decays of running means of the estimate and of its square, Adam's b1 and b2; 0: none.
        anchor: share of the way back to where step 0 began, at each step.
        seed: of the directions.
        sigma_guess: with sigma "auto" what it begins at in place of 0.01, such as the last one of an earlier training.
        groups: in place of the one group: dicts with lr, eps, weight_decay and auto_eps, read at each step. Theirs is the
            eps that "auto" changes.

    Raises ValueError: an argument out of range.

    >>> strategy = ESStrategy(lr=0.1, sigma=0.5, population=2)
    >>> [member.t for member in strategy.ask(0)]
    [1.0, -1.0]
    >>> strategy.tell([3.0, 1.0]).coefficients  # -(F_1 - F_2) / (P eps): what theta loses, of z-scores 1 and -1
    [-2.0]
    """

    needs = frozenset(("sigma", "sigma_changed"))  # what every version's state has, and no other strategy's

    def __init__(
        self,
        lr: float = 1e-3,
        sigma: float | str = sigmas.FIRST,
        weight_decay: float = 0.0,
        *,
        population: int = 32,
        antithetic: bool = True,
        shaping: str = "z_score",
        normalize: bool = False,
        momentum: float = 0.0,
        second_moment: float = 0.0,
        anchor: float = 0.0,
        seed: int = 0,
        sigma_guess: float | None = None,
        groups: list[Group] | None = None,
    ) -> None:
        if not hasattr(population, "__index__") or population < 2 or (antithetic and population % 2):
            rule = "an even number of at least 2 (members come in pairs)" if antithetic else "at least 2"
            raise ValueError(f"population: must be {rule}, got {population}")
        if sigma != "auto" and not 0 < number(sigma) < math.inf:
            raise ValueError(f"sigma: must be a number greater than 0 or 'auto', got {sigma!r}")
        check_guess("sigma_guess", sigma_guess)
        check_seed(seed)
        if shaping not in SHAPINGS:
            raise ValueError(f"shaping: must be one of {', '.join(SHAPINGS)}, got {shaping!r}")
        for name, value in (("momentum", momentum), ("second_moment", second_moment), ("anchor", anchor)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: must lie in [0, 1), got {value}")
        sigma = sigma if isinstance(sigma, str) else float(sigma)
        one = {"lr": lr, "eps": sigma, "weight_decay": weight_decay, "auto_eps": sigma == "auto"}
        self.groups: list[Group] = [one] if groups is None else groups
        self.population, self.antithetic, self.shaping, self.normalize = population, antithetic, shaping, normalize
        self.momentum, self.second_moment, self.anchor, self.seed = momentum, second_moment, anchor, seed
        self.first_sigma = sigmas.FIRST if sigma_guess is None else float(sigma_guess)
        self.skipped_steps = self.unscored_steps = 0  # the latter: those of them without a reward from every member
        self.changed = 1.0  # sigma, since the first step
        self._step = -1

    def ask(self, step: int) -> list[Displacement]:
        """All members of a step: +sigma and -sigma of each direction, or +sigma of each."""
        self._step = step
        for group in self.groups:
            if group["eps"] == "auto":
                group["eps"] = self.first_sigma
        eps = tuple(float(group["eps"]) for group in self.groups)
        plus = [Displacement(self.seed, query, step, 1.0, eps) for query in range(self.directions_count)]
        return [side for member in plus for side in (member, member.mirrored)] if self.antithetic else plus

    def tell(self, values: Rewards) -> StepRecord:
        """The step of the members' rewards, in the order of `ask`.

        A prompt of which a reward is not finite counts for no member. The step is skipped where nothing is left, or
        where members do not differ.

        Raises:
            ValueError: not one for each member, or not as many for each; of one prompt alone, where sigma is "auto".
        """
        told = _rows(values, self.population)
        automatic = any(group["auto_eps"] for group in self.groups)
        if automatic and len(told[0]) < 2:
            rule = "sigma: 'auto' must be told the rewards of at least 2 prompts for each member, got 1"
            raise ValueError(f"{rule}. Give it a number.")
        rewards = self._complete(told)
        eps = [float(group["eps"]) for group in self.groups]
        means = [shapes.mean(row) for row in rewards] if rewards else [math.nan] * self.population
        between, noise = shapes.spread(rewards) if rewards else (math.nan, math.nan)
        fitness = shapes.shape(means, self.shaping) if rewards else [0.0] * self.population
        skipped = not any(fitness)
        coefficients = [-weight / (self.population * eps[0]) for weight in self._signed(fitness)]
        skipped = skipped or not any(coefficients)
        if self.normalize and not skipped:
            length = math.sqrt(math.fsum(c * c for c in coefficients))
            coefficients = [c / length for c in coefficients]
        record = StepRecord(
            step=self._step,
            seed=self.seed,
            projected_gradients=[-slope / eps[0] for slope in self._slopes(means)],
            coefficients=[0.0 if skipped else c for c in coefficients],
            learning_rates=[float(group["lr"]) for group in self.groups],
            eps=eps,
            weight_decay=[float(group["weight_decay"]) for group in self.groups],
            loss=-shapes.mean(means),
            signal_to_noise=math.sqrt(between / noise) if noise else math.inf if between else math.nan,
            skipped=skipped,
            momentum=self.momentum,
            second_moment=self.second_moment,
            anchor=self.anchor,
        )
        if skipped:
            self.skipped_steps += 1
            self.unscored_steps += not rewards
            why = "no reward tells members apart" if rewards else "nothing has a reward from every member"
            logger.info("step %d skipped: %s (%d so far)", self._step, why, self.skipped_steps)
        if automatic and len({value for row in rewards for value in row}) > 1:
            self._adapt(between, noise)
        return record

    @property
    def directions_count(self) -> int:
        return self.population // 2 if self.antithetic else self.population

    def _adapt(self, between: float, noise: float) -> None:
        factor = sigmas.factor(between, noise, self.changed)
        self.changed *= factor
        for group in self.groups:
            if group["auto_eps"]:
                group["eps"] *= factor

    def _signed(self, values: Sequence[float]) -> list[float]:
        """sum of s_m F_m over the members of each direction."""
        if not self.antithetic:
            return list(values)
        return [plus - minus for plus, minus in zip(values[0::2], values[1::2], strict=True)]

    def _slopes(self, means: Sequence[float]) -> list[float]:
        """Differences of mean rewards along each direction: half of both sides', or one side's from the population's."""
        if self.antithetic:
            return [difference / 2 for difference in self._signed(means)]
        centre = shapes.mean(means)
        return [value - centre for value in means]

    def _complete(self, rewards: list[list[float]]) -> list[list[float]]:
        """Without the prompts of which a reward is not finite; empty where none is left."""
        columns = [column for column in zip(*rewards, strict=True) if all(map(math.isfinite, column))]
        return [list(row) for row in zip(*columns, strict=True)]

    def state(self) -> dict[str, Any]:
        """What goes on with a run, beside its options."""
        eps = [group["eps"] for group in self.groups]
        counted = {"skipped_steps": self.skipped_steps, "unscored_steps": self.unscored_steps}
        return {**counted, "seed": self.seed, "sigma_changed": self.changed, "sigma": eps}

    def load(self, state: dict[str, Any]) -> None:
        self.skipped_steps, self.seed, self.changed = state["skipped_steps"], state["seed"], state["sigma_changed"]
        self.unscored_steps = state.get("unscored_steps", 0)  # which 0.1.0 does not count
        for group, eps in zip(self.groups, state["sigma"], strict=True):
            group["eps"] = eps


def _rows(values: Rewards, members: int) -> list[list[float]]:
    """Rewards of each member by prompt; of one number a member, those of one prompt."""
    given: Sequence[Any] = values.tolist() if isinstance(values, Tensor) else values
    rows = [_row(value) for value in given]
    if len(rows) != members or len({len(row) for row in rows}) != 1 or not rows[0]:
        lengths = sorted({len(row) for row in rows})
        raise ValueError(
            f"rewards: must be one for each of {members} members, or one for each of their prompts, got {len(rows)} "
            f"of lengths {lengths}"
        )
    return rows


def _row(value: Any) -> list[float]:
    """A member's rewards: of a number of any kind, or of many."""
    try:
        return [_reward(value)]
    except (TypeError, ValueError, RuntimeError):
        return [_reward(one) for one in value]


def _reward(value: Any) -> float:
    return math.nan if value is None else float(value)
