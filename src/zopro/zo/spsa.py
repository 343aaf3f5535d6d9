"""SPSA as a `torch.optim.Optimizer`: two evaluations of the loss instead of a backward pass.

The projected gradient along z is g = (L(theta + eps z) - L(theta - eps z)) / (2 eps), and the step is
theta <- theta - lr (g z + weight_decay theta) (Spall 1992; Malladi et al. 2023; Galatolo et al. 2025).
Departures from the paper's code: theta is restored to the bit, z is drawn again at every step and never depends on the
rank, decay spares biases and norms, a non-finite loss skips the step, and `eps="auto"` and the signal-to-noise ratio
say whether a projected gradient is more than rounding.

    opt = SPSA(model.named_parameters(), lr=1e-3, directions=Gaussian())
    for batch in loader:
        loss = opt.step(lambda: loss_function(model, batch))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from zopro.zo import groups
from zopro.zo.directions import Directions, Gaussian
from zopro.zo.displacement import Displacement, Values
from zopro.zo.evaluation import Closure, Evaluator, one_number
from zopro.zo.optimizer import Of, Recorded
from zopro.zo.perturbation import Virtual
from zopro.zo.ranks import Ranks, losses_of_all
from zopro.zo.records import Estimate, StepRecord
from zopro.zo.strategy import SPSAStrategy
from zopro.zo.together import Together
from zopro.zo.unread import Unread
from zopro.zo.weights import Weights


class SPSA(Recorded):
    """Simultaneous perturbation stochastic approximation.

    Args:
        params: tensors, (name, tensor) pairs, or parameter groups of either, each with its own `lr` and `eps`.
            Directions are keyed by name; unnamed tensors are called "<group>.<index>". What has requires_grad=False
            stays as it is for as long as it has; only a plain tensor (no `nn.Parameter`) that is given so is trained,
            since nobody has frozen it. Tensors that the loss never reads stay as they are too (`zopro.zo.unread`).
        lr: learning rate.
        eps: perturbation scale, or "auto" to choose it from the noise floor at the first estimate.
        directions: where z comes from.
        queries: directions averaged in each step.
        sides: 2 for central differences, 1 for forward differences (L(theta) evaluated once for all queries).
        weight_decay: decoupled decay of tensors with two or more dimensions (so not of biases and norms).
        seed: of the directions; never touches the global random state.
        second_moment_beta: if given, divide g by the root of its running mean square (Adam's second moment, as one
            scalar), which makes `lr` the change of a weight in a typical step for directions of root mean square 1.
        measure_noise: measure the noise floor at the first estimate (about 10 evaluations); implied by eps="auto".
        over_std: divide the step by the spread of the one-sided slopes (FZOO; see `SPSAStrategy`).
        eps_guess: with eps="auto", an eps that did before (by default a step's length, where slopes are normalised): kept
            if 11 evaluations do not speak against it.
        perturbation: "in_place" (keeps a copy of the parameters), "virtual" (no copy) or "auto" (by their number).
        evaluation: "sequential", or "together": both sides in one pass, for closures that ask `together.rows`.
        ranks: processes that share the batch or the queries (then sequential). All begin with the same parameters.
        before_apply: called with each step's record before a parameter changes (a journal); if it raises, none does.

    All evaluations of a step see the same global random state (dropout draws the same mask; not in a copied batch).
    A copy (`copy.deepcopy`, pickle) goes on as the original would, without its hooks, its `before_apply` and its engine.
    Raises ValueError: an argument out of range; no tensor to train.

    >>> theta = torch.tensor([3.0])
    >>> opt = SPSA([("theta", theta)], lr=0.1)
    >>> losses = [float(opt.step(lambda: theta.square().sum())) for _ in range(30)]
    >>> losses[-1] < 0.1 * losses[0]
    True
    """

    strategy: SPSAStrategy
    queries, sides, measure_noise = (Of("strategy") for _ in range(3))
    signal, second_moment, trusts_known_loss = (Of("strategy") for _ in range(3))

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: float | str = 1e-3,
        directions: Directions | None = None,
        queries: int = 1,
        sides: int = 2,
        weight_decay: float = 0.0,
        seed: int = 0,
        *,
        second_moment_beta: float | None = None,
        measure_noise: bool = False,
        over_std: bool = False,
        eps_guess: float | None = None,
        perturbation: str = "auto",
        evaluation: str = "sequential",
        ranks: Ranks | None = None,
        before_apply: Callable[[StepRecord], None] | None = None,
    ) -> None:
        sequential_only = sides != 2 or getattr(ranks, "parallel", "data") != "data"
        if evaluation not in ("sequential", "together") or (evaluation == "together" and sequential_only):
            raise ValueError(f"evaluation: must be sequential, or together with sides=2, got {evaluation!r}, {sides=}")
        strategy = SPSAStrategy(
            queries=queries,
            sides=sides,
            seed=seed,
            second_moment_beta=second_moment_beta,
            measure_noise=measure_noise,
            over_std=over_std,
            eps_guess=eps_guess,
            groups=[],
        )
        self.together = Together([])
        self.evaluation = evaluation
        self.unread = Unread()
        weights = Weights([], directions or Gaussian(), perturbation)
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, strategy, weights, ranks, before_apply)

    @torch.no_grad()
    def measure(self, closure: Closure, loss_at_theta: float | None = None) -> Estimate:
        """Evaluate `closure` around theta along this step's directions; theta is as before when it returns or raises.

        Args:
            closure: () -> scalar loss, evaluated `sides` times per query (plus once for one-sided).
            loss_at_theta: L(theta), averaged over ranks, where it is known without a forward pass (on-policy RLOO).
                Used one-sided only, and only if it agrees with an evaluation at the first estimate, whose slopes
                it must not move by more than a tenth (in bfloat16 a model's losses depend on how they are computed).
        """
        evaluator = self.evaluator()
        return self.measure_by(lambda at: evaluator.results(closure, at, one_number), evaluator, loss_at_theta)

    def evaluator(self) -> Evaluator:
        """A way to be at displacements of the coming step in this process; it keeps the random state of now."""
        self._trained()
        return Evaluator(self.weights, self.together if self.evaluation == "together" else None)

    @torch.no_grad()
    def measure_by(
        self, values: Values, evaluator: Evaluator | None = None, loss_at_theta: float | None = None
    ) -> Estimate:
        """As `measure`, by losses that something else evaluates, such as an engine.

        Args:
            values: this rank's losses at displacements; it gets all of a step's in one call.
            evaluator: what `values` displaces tensors with. None: they are not displaced here, and it cannot be seen
                whether the loss reads all of them.
        """
        movable = self._trained()
        displaced = {name for name, _, _ in self.weights.entries}
        reads = self.unread.watch(movable) if evaluator is not None else None

        def losses(at: Sequence[Displacement]) -> list[float]:
            return losses_of_all(self.ranks, values, at)

        if evaluator is not None:
            evaluator.watch = None if reads is None else reads.watch
        self.strategy.calibrate(self.step_count, losses, self.weights.scale)
        estimate = self.strategy.estimate(losses(self.strategy.ask(self.step_count, loss_at_theta)))
        if evaluator is not None and reads is not None and estimate.finite:
            evaluator.watch = None
            if estimate.differs:
                first = self.strategy.first(self.step_count)
                self.unread.look(reads, lambda: losses([first]), self.ranks, movable)
            elif not reads.touched and self.ranks is None and isinstance(evaluator.reading, Virtual):
                self.unread.warn_of_virtual()
        moved = displaced - self.unread.left_out.keys()
        left_out = {name for name, _, _ in groups.named(self.param_groups)} - moved
        return dataclasses.replace(estimate, left_out=frozenset(left_out))

    def _current(self) -> None:
        """Tell the parts the groups and what is left out: both may be others since the last step."""
        super()._current()
        self.weights.left_out = self.unread.left_out

    def accumulate(self, estimate: Estimate, weight: float = 1.0) -> None:
        """Add one micro-batch's estimate to the coming step. All micro-batches of a step share its directions."""
        self.strategy.accumulate(estimate, weight)

    def estimate(self, closure: Closure, loss_at_theta: float | None = None) -> float:
        """Measure and accumulate one micro-batch; `apply` then steps along the mean. Returns the loss."""
        estimate = self.measure(closure, loss_at_theta)
        self.accumulate(estimate)
        return estimate.loss

    @torch.no_grad()
    def apply(self) -> StepRecord:
        """Take the step from what was accumulated.

        Raises:
            RuntimeError: nothing was accumulated.
            InputError: the learning rate would leave weights that are of no use; none has moved then.
        """
        self._current()
        return self.take(lambda: self.strategy.conclude(self.step_count, self.accumulation == "mean"))

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One step: estimate with `closure` and apply, or apply what was accumulated. Returns the loss, if measured."""
        loss = self.estimate(closure) if closure is not None else None
        self.apply()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was accumulated and not applied. There are no gradients to clear."""
        self.strategy.forget()

    def _more_state(self) -> dict[str, Any]:
        return {"unread": self.unread.state()}

    def _load_more(self, own: dict[str, Any]) -> None:
        self.unread.load(own.get("unread", Unread().state()))  # earlier versions did not look
