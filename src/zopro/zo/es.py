"""Evolution strategies as a `torch.optim.Optimizer`: a population's rewards instead of a backward pass.

theta <- theta + lr / (P sigma) sum_m F_m s_m z_m, with the members' shaped rewards F (`zopro.zo.evolution`). What can be
scored can be improved: no loss is wanted, rewards need not be smooth, and more is better.

    es = ES(model.named_parameters(), lr=1e-3, sigma=1e-2, population=32)
    for _ in range(100):
        reward = es.step(lambda: rewards_of(model))        # one for each prompt, of the model as it is displaced
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from zopro.zo.directions import Directions, Gaussian, there
from zopro.zo.displacement import Displacement
from zopro.zo.evaluation import Evaluator
from zopro.zo.evolution import ESStrategy, Rewards
from zopro.zo.optimizer import Of, Recorded
from zopro.zo.ranks import Ranks
from zopro.zo.records import StepRecord
from zopro.zo.sigma import FIRST
from zopro.zo.weights import Weights


class ES(Recorded):
    """Evolution strategies (Salimans et al. 2017, arXiv 1703.03864; Qiu et al. 2025, arXiv 2509.24372).

    Args:
        params: tensors, (name, tensor) pairs, or parameter groups of either, each with its own `lr` and `eps` (sigma);
            which of them move is as in `zopro.SPSA`.
        lr: learning rate.
        sigma: scale of the displacements, or "auto" (`zopro.zo.sigma`), which takes rewards per prompt.
        population: members, P.
        directions: where z comes from.
        weight_decay: decoupled decay of tensors with two or more dimensions.
        perturbation: "in_place" (keeps a copy of the parameters), "virtual" (no copy) or "auto" (by their number).
        ranks: processes that share the members or the prompts. All begin with the same parameters.
        before_apply: called with each step's record before a parameter changes (a journal); if it raises, none does.

    antithetic, shaping, normalize, momentum, second_moment, anchor, seed and sigma_guess are those of
    `zopro.zo.ESStrategy`. The moments cost a tensor each beside the parameters, the anchor one more.

    All members of a step see the same global random state, so that they draw the same dropout and the same tokens.
    Raises ValueError: an argument out of range; no tensor to train.

    >>> theta = torch.zeros(3)
    >>> es = ES([("theta", theta)], lr=0.02, sigma=0.1, population=8, shaping="centred_rank", momentum=0.5)
    >>> rewards = [es.step(lambda: -(theta - 1).abs().sum()) for _ in range(60)]
    >>> rewards[-1] > 0.3 * rewards[0]
    True
    """

    strategy: ESStrategy
    population, antithetic, shaping, unscored_steps = (Of("strategy") for _ in range(4))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        sigma: float | str = FIRST,
        population: int = 32,
        directions: Directions | None = None,
        *,
        antithetic: bool = True,
        shaping: str = "z_score",
        normalize: bool = False,
        momentum: float = 0.0,
        second_moment: float = 0.0,
        anchor: float = 0.0,
        weight_decay: float = 0.0,
        seed: int = 0,
        sigma_guess: float | None = None,
        perturbation: str = "auto",
        ranks: Ranks | None = None,
        before_apply: Callable[[StepRecord], None] | None = None,
    ) -> None:
        strategy = ESStrategy(
            sigma=sigma,
            population=population,
            antithetic=antithetic,
            shaping=shaping,
            normalize=normalize,
            momentum=momentum,
            second_moment=second_moment,
            anchor=anchor,
            seed=seed,
            sigma_guess=sigma_guess,
            groups=[],
        )
        self._told: list[list[list[float]]] = []  # of each micro-batch: members, prompts
        weights = Weights([], directions or Gaussian(), perturbation)
        defaults = {"lr": lr, "eps": sigma, "weight_decay": weight_decay}
        super().__init__(params, defaults, strategy, weights, ranks, before_apply)

    def ask(self) -> list[Displacement]:
        """The members of the coming step, for an engine of your own: theta + t sigma z each, no tensors."""
        self._trained()
        return self.strategy.ask(self.step_count)

    def tell(self, rewards: Rewards) -> StepRecord:
        """Take the step of all members' rewards, (P,) or (P, prompts), in the order of `ask`.

        Raises:
            ValueError: of other shapes; sigma is "auto" and there is one prompt.
            InputError: the learning rate would leave weights that are of no use; none has moved then.
        """
        self.ask()
        return self.take(lambda: self.strategy.tell(rewards))

    def measure_by(self, rewards: Callable[[Sequence[Displacement]], list[list[float]]]) -> list[list[float]]:
        """All members' rewards, (P, prompts): of all ranks, of which each asks `rewards` once for its part."""
        at = self.ask()
        if self.ranks is None:
            return rewards(at)
        return self.ranks.rewards(lambda indices: rewards([at[index] for index in indices]) if indices else [], len(at))

    def accumulate(self, rewards: list[list[float]]) -> None:
        """Add one micro-batch's prompts to the coming step, whose members answer all of them."""
        self._told.append(rewards)

    @torch.no_grad()
    def step(self, evaluate: Callable[[], Any] | None = None) -> float | None:  # type: ignore[override]
        """Evaluate all members and take the step, or take the step of what was accumulated.

        Args:
            evaluate: () -> the reward of the parameters as they are, a number or one for each prompt. They are displaced
                while it runs, and as before when it returns or raises.

        Returns:
            The members' mean reward, if they were evaluated.
        """
        if evaluate is not None:
            self._trained()
            evaluator = Evaluator(self.weights)
            self.accumulate(self.measure_by(lambda at: evaluator.results(evaluate, at, _numbers)))
        if not self._told:
            raise RuntimeError("step: nothing to apply, pass a function of rewards or accumulate rewards first")
        told, self._told = self._told, []
        record = self.tell([[value for rows in batch for value in rows] for batch in zip(*told, strict=True)])
        return None if evaluate is None else -record.loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was accumulated and not applied. There are no gradients to clear."""
        self._told = []

    def _more_state(self) -> dict[str, Any]:
        return {"moments": self.weights.moments.state()}

    def _load_more(self, own: dict[str, Any]) -> None:
        self.weights.moments.load(own["moments"])


def _numbers(reward: Any) -> list[float]:
    """What an evaluation returned: one reward, or one for each prompt, None where there is none."""
    if reward is None:
        raise ValueError("evaluate: must return a reward, or a list of one for each prompt, got None. Return them.")
    if isinstance(reward, list | tuple):
        reward = [math.nan if one is None else one for one in reward]
    try:
        given = torch.as_tensor(reward)
    except (TypeError, ValueError) as error:
        got = type(reward).__name__
        raise ValueError(f"evaluate: must return a reward, or a list of one for each prompt, got {got}.") from error
    values: list[float] = there.in_float64(given).flatten().tolist()
    return values
