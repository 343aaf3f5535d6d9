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
import logging
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from zopro.zo import groups
from zopro.zo.calibration import calibrate
from zopro.zo.differences import central, forward
from zopro.zo.directions import Directions, Gaussian, tensor_generator
from zopro.zo.displacements import Displacements
from zopro.zo.evaluation import Closure, Evaluator
from zopro.zo.monitor import ResolutionMonitor, SecondMoment, SignalMonitor
from zopro.zo.perturbation import PERTURBATIONS, choose
from zopro.zo.ranks import Ranks
from zopro.zo.records import Accumulated, Estimate, StepRecord
from zopro.zo.together import Together
from zopro.zo.unread import Unread
from zopro.zo.update import check_size, take

logger = logging.getLogger(__name__)
EVALUATIONS = ("sequential", "together")


class SPSA(torch.optim.Optimizer):
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
        measure_noise: measure the noise floor at the first estimate (about 7 evaluations); implied by eps="auto".
        perturbation: "in_place" (keeps a copy of the parameters), "virtual" (no copy) or "auto" (by their number).
        evaluation: "sequential", or "together": both sides in one pass, for closures that ask `together.rows`.
        ranks: processes that share the batch or the queries (then sequential). All begin with the same parameters.
        before_apply: called with each step's record before a parameter changes (a journal); if it raises, none does.

    All evaluations of a step see the same global random state (dropout draws the same mask; not in a copied batch).
    A copy (`copy.deepcopy`, pickle) goes on as the original would, without its hooks and its `before_apply`.
    Raises ValueError: an argument out of range; no tensor to train.

    >>> theta = torch.tensor([3.0])
    >>> opt = SPSA([("theta", theta)], lr=0.1)
    >>> losses = [float(opt.step(lambda: theta.square().sum())) for _ in range(30)]
    >>> losses[-1] < 0.1 * losses[0]
    True
    """

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
        perturbation: str = "auto",
        evaluation: str = "sequential",
        ranks: Ranks | None = None,
        before_apply: Callable[[StepRecord], None] | None = None,
    ) -> None:
        if queries < 1:
            raise ValueError(f"queries: must be at least 1, got {queries}")
        if sides not in (1, 2):
            raise ValueError(f"sides: must be 1 or 2, got {sides}")
        if second_moment_beta is not None and not 0 <= second_moment_beta < 1:
            raise ValueError(f"second_moment_beta: must lie in [0, 1), got {second_moment_beta}")
        if perturbation not in PERTURBATIONS:
            raise ValueError(f"perturbation: must be one of {', '.join(PERTURBATIONS)}, got {perturbation!r}")
        sequential_only = sides != 2 or getattr(ranks, "parallel", "data") != "data"
        if evaluation not in EVALUATIONS or (evaluation == "together" and sequential_only):
            raise ValueError(f"evaluation: must be sequential, or together with sides=2, got {evaluation!r}, {sides=}")
        self.directions = directions or Gaussian()
        self.queries = queries
        self.sides = sides
        self.seed = seed
        self.measure_noise = measure_noise
        self.perturbation = perturbation
        self.evaluation = evaluation
        self.together = Together([])
        self.ranks = ranks
        self.before_apply = before_apply
        self.accumulation = "mean"  # over micro-batches; "sum" where their weights already normalise them
        self.step_count = 0
        self.skipped_steps = 0
        self.signal, self.resolution = SignalMonitor(), ResolutionMonitor()
        self.unread = Unread()
        self.second_moment = SecondMoment(second_moment_beta)
        self.trusts_known_loss: bool | None = None  # of L(theta) given to `measure`; None: not compared yet
        self.last: StepRecord | None = None
        self._accumulated = Accumulated()
        self._free: list[Tensor] = []  # plain tensors, whose requires_grad says nothing
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})
        self.directions.check([(name, tensor) for name, tensor, _ in groups.trained(self.param_groups, self._free)])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options. Raises ValueError: an option out of range, a name that is taken."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("auto_eps", group["eps"] == "auto")  # the group's eps becomes a number once it is chosen
        try:
            groups.check(self.param_groups)
        except ValueError:
            self.param_groups.pop()
            raise
        self._free += [p for p in group["params"] if not (p.requires_grad or isinstance(p, torch.nn.Parameter))]

    @staticmethod
    def query_seed(query: int, seed: int) -> int:
        """Seed of the directions of a step's `query`-th query: `seed` itself for the first."""
        return seed if query == 0 else tensor_generator("query", seed, query, torch.device("cpu")).initial_seed()

    @torch.no_grad()
    def measure(self, closure: Closure, loss_at_theta: float | None = None) -> Estimate:
        """Evaluate `closure` around theta along this step's directions; theta is as before when it returns or raises.

        Args:
            closure: () -> scalar loss, evaluated `sides` times per query (plus once for one-sided).
            loss_at_theta: L(theta), averaged over ranks, where it is known without a forward pass (on-policy RLOO).
                Used one-sided only, and only if it agrees with an evaluation at the first estimate, whose slopes
                it must not move by more than a tenth (in bfloat16 a model's losses depend on how they are computed).
        """
        movable = groups.trained(self.param_groups, self._free)
        around = Displacements([e for e in movable if e[0] not in self.unread.left_out], self.directions, self.step_count)
        self.together.parameters = around.tensors
        evaluate = Evaluator(closure, choose(self.perturbation, around.tensors), self.ranks)
        reads = self.unread.watch(movable)
        evaluate.watch = None if reads is None else reads.watch
        wanted = self.measure_noise or any(group["auto_eps"] for group in self.param_groups)
        if wanted and math.isnan(self.signal.noise_floor):
            self.signal.noise_floor = calibrate(self.param_groups, evaluate, around, self.seed, self.sides)
        if any(group["eps"] == "auto" for group in self.param_groups):  # no finite loss to choose it from
            return Estimate([(math.nan, math.nan)] * self.queries, [math.nan] * self.queries)
        seeds = [self.query_seed(query, self.seed) for query in range(self.queries)]
        if self.sides == 1:
            trusted = self.trusts_known_loss
            estimate, self.trusts_known_loss = forward(evaluate, around, seeds, loss_at_theta, trusted)
        elif self.evaluation == "sequential":
            estimate = central(evaluate, around, seeds)
        else:
            both = Evaluator(closure, self.together, self.ranks)
            both.watch = evaluate.watch
            estimate = central(both, around, seeds)
        if reads is not None and estimate.finite and any(plus != other for plus, other in estimate.losses):
            self.unread.look(reads, evaluate, around.at(self.seed, 1.0), movable)
        moved = {name for name, _, _ in around.entries if name not in self.unread.left_out}
        left_out = {name for name, _, _ in groups.named(self.param_groups)} - moved
        return dataclasses.replace(estimate, left_out=frozenset(left_out))

    def accumulate(self, estimate: Estimate, weight: float = 1.0) -> None:
        """Add one micro-batch's estimate to the coming step. All micro-batches of a step share its directions."""
        self._accumulated.add(estimate, weight)

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
        total, self._accumulated = self._accumulated, Accumulated()
        if not total.count:
            raise RuntimeError("apply: nothing to apply, call estimate(closure) first or pass a closure to step")
        normaliser = total.weight if self.accumulation == "mean" else 1.0
        movable = groups.movable(self.param_groups, self._free)
        moving = {name for name, _, _ in movable} - total.left_out
        eps = [math.nan if group["eps"] == "auto" else float(group["eps"]) for group in self.param_groups]
        gradients = [difference / normaliser / eps[0] for difference in total.differences]
        finite = total.finite and all(math.isfinite(g) for g in gradients)
        if finite:
            scale = self.second_moment.root(gradients)
            coefficients = [g / scale / self.queries for g in gradients]
        else:
            coefficients = [0.0] * self.queries
            self.skipped_steps += 1
            logger.warning("step %d skipped: the loss was not finite (%d so far)", self.step_count, self.skipped_steps)
        self.last = StepRecord(
            step=self.step_count,
            seed=self.seed,
            projected_gradients=gradients,
            coefficients=coefficients,
            learning_rates=[float(group["lr"]) for group in self.param_groups],
            eps=eps,
            weight_decay=[float(group["weight_decay"]) for group in self.param_groups],
            loss=total.loss / normaliser,
            signal_to_noise=self.signal.ratio(total.signal),
            skipped=not finite,
            left_out=[name for name, _, _ in groups.named(self.param_groups) if name not in moving],
        )
        chosen = any(group["auto_eps"] for group in self.param_groups)
        self.signal.watch(self.step_count, self.last.signal_to_noise, chosen)
        if finite:
            check_size(self.last, movable, self.param_groups)
        if self.before_apply is not None:
            self.before_apply(self.last)
        self.resolution.begin(self.step_count)
        self.replay(self.last)
        self.resolution.end(self.step_count, max(self.last.learning_rates))
        self.step_count += 1
        return self.last

    @torch.no_grad()
    def replay(self, record: StepRecord) -> None:
        """Apply a recorded step to the parameters without any evaluation: bit-equal to when it was taken.

        What is frozen stays, as does what stayed then.
        """
        if record.skipped:
            return
        still = set(record.left_out)
        entries = [entry for entry in groups.movable(self.param_groups, self._free) if entry[0] not in still]
        seeds = [self.query_seed(query, record.seed) for query in range(len(record.coefficients))]
        take(record, entries, self.param_groups, self.directions, seeds, self.resolution)

    def step(self, closure: Closure | None = None) -> float | None:  # type: ignore[override]
        """One step: estimate with `closure` and apply, or apply what was accumulated. Returns the loss, if measured."""
        loss = self.estimate(closure) if closure is not None else None
        self.apply()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what was accumulated and not applied. There are no gradients to clear."""
        self._accumulated = Accumulated()

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["zeroth_order"] = {
            "step_count": self.step_count,
            "skipped_steps": self.skipped_steps,
            "low_signal_steps": self.signal.low_steps,
            "seed": self.seed,
            "mean_square": self.second_moment.mean_square,
            "moment_weight": self.second_moment.weight,
            "noise_floor": self.signal.noise_floor,
            "trusts_known_loss": self.trusts_known_loss,
            "unread": self.unread.state(),
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken. Raises ValueError if it is another kind of optimiser's."""
        own = state_dict.get("zeroth_order")
        if own is None:
            raise ValueError(f"state_dict: must come from SPSA, got one with the keys {sorted(state_dict)}")
        super().load_state_dict(state_dict)
        self.step_count, self.skipped_steps, self.seed = own["step_count"], own["skipped_steps"], own["seed"]
        self.signal.low_steps, self.signal.noise_floor = own["low_signal_steps"], own["noise_floor"]
        self.trusts_known_loss = own["trusts_known_loss"]
        self.unread.load(own.get("unread", Unread().state()))  # earlier versions did not look
        self.second_moment.mean_square, self.second_moment.weight = own["mean_square"], own["moment_weight"]

    def __getstate__(self) -> dict[str, Any]:
        """For copies; torch's own keeps parameters and options alone. Schedulers put a `step` of theirs on the object."""
        own = {name: value for name, value in self.__dict__.items() if name != "step" and not name.endswith("_hooks")}
        return {**own, "before_apply": None}
