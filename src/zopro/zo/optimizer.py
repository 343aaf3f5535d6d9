"""What optimisers without gradients have in common: records of a strategy, taken by the tensors that they move."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch

from zopro.zo import groups
from zopro.zo.displacement import query_seed
from zopro.zo.perturbation import PERTURBATIONS
from zopro.zo.ranks import Ranks
from zopro.zo.records import StepRecord
from zopro.zo.weights import Weights


class Of:
    """An attribute of one of the optimiser's parts, read and set as if it were its own."""

    def __init__(self, part: str) -> None:
        self.part, self.name = part, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else getattr(getattr(optimizer, self.part), self.name)

    def __set__(self, optimizer: Any, value: Any) -> None:
        setattr(getattr(optimizer, self.part), self.name, value)


class Recorded(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose every step is a `StepRecord`: kept, exchanged and replayed in place of tensors.

    Args:
        params: tensors, (name, tensor) pairs, or parameter groups of either.
        defaults: lr, eps and weight_decay of groups that have none of their own.
        strategy: what displacements are asked, and what a step is made of.
        weights: of no groups yet; theirs are the optimiser's.
        ranks: processes that share the work. All begin with the same parameters.
        before_apply: called with each step's record before a parameter changes (a journal); if it raises, none does.

    A copy (`copy.deepcopy`, pickle) goes on as the original would, without its hooks, its `before_apply` and its engine.
    Raises ValueError: an argument out of range; no tensor to train.
    """

    seed, skipped_steps = (Of("strategy") for _ in range(2))
    directions, perturbation, resolution = (Of("weights") for _ in range(3))
    query_seed = staticmethod(query_seed)
    accumulation = "mean"  # over micro-batches; "sum" where their weights already normalise them

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        strategy: Any,
        weights: Weights,
        ranks: Ranks | None,
        before_apply: Callable[[StepRecord], None] | None,
    ) -> None:
        if weights.perturbation not in PERTURBATIONS:
            known = ", ".join(PERTURBATIONS)
            raise ValueError(f"perturbation: must be one of {known}, got {weights.perturbation!r}")
        self.strategy, self.weights, self.ranks, self.before_apply = strategy, weights, ranks, before_apply
        self.move: Callable[[StepRecord], None] | None = None  # in place of `weights.apply`: an engine's
        self.step_count = 0
        self.last: StepRecord | None = None
        super().__init__(params, defaults)
        self.directions.check([(name, tensor) for name, tensor, _ in self._trained()])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options. Raises ValueError: an option out of range, a name that is taken, a
        tensor that the directions do not fit."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("auto_eps", group["eps"] == "auto")  # the group's eps becomes a number once it is chosen
        try:
            groups.check(self.param_groups)
            self.weights.add_free(group)
            if self.weights.groups:  # else the constructor is at work, which has yet to see all of them
                self.directions.check([(name, tensor) for name, tensor, _ in self._trained()])
        except BaseException:
            self.param_groups.pop()
            raise
        if group["eps"] != "auto":
            group["eps"] = float(group["eps"])

    def _current(self) -> None:
        """Tell the parts the groups, which may be others since the last step."""
        self.strategy.groups = self.weights.groups = self.param_groups

    def _trained(self) -> list[groups.Entry]:
        """What may move. Raises ValueError where nothing may."""
        self._current()
        return groups.trained(self.param_groups, self.weights.free)

    @torch.no_grad()
    def take(self, step: Callable[[], StepRecord]) -> StepRecord:
        """Take a step of the strategy's, told to `before_apply` first; returns the record with the names of the tensors
        that stay. If it is refused, the strategy's state is as it was; what was accumulated is dropped.

        Raises:
            InputError: the learning rate would leave weights that are of no use; none has moved then.
        """
        before = self.strategy.state()
        record = step()
        moving = {name for name, _, _ in self.weights.movable} - set(record.left_out)
        still = [name for name, _, _ in groups.named(self.param_groups) if name not in moving]
        self.last = dataclasses.replace(record, left_out=still)
        try:
            if not self.last.skipped:
                self.weights.check(self.last)
            if self.before_apply is not None:
                self.before_apply(self.last)
        except BaseException:
            self.strategy.load(before)
            raise
        self.weights.resolution.begin(self.step_count)
        (self.move or self.weights.apply)(self.last)
        self.weights.resolution.end(self.step_count, max(self.last.learning_rates))
        self.step_count += 1
        return self.last

    def replay(self, record: StepRecord) -> None:
        """Apply a recorded step to the parameters without any evaluation: bit-equal to when it was taken.

        What is frozen stays, as does what stayed then. Records are replayed in order from the first, and steps go on
        after the last. What a strategy keeps (a chosen eps, the mean square of g) comes with a `state_dict`.
        """
        self._current()
        self.weights.apply(record)
        self.step_count = record.step + 1

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        state["zeroth_order"] = {"step_count": self.step_count, **self.strategy.state(), **self._more_state()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; what was accumulated and not applied is dropped.

        Raises ValueError: of another kind of optimiser; of tensors with other names, by which their noise is drawn.
        """
        own = state_dict.get("zeroth_order")
        if own is None or not own.keys() >= self.strategy.needs:
            keys = sorted({*state_dict, *(own or ())})
            raise ValueError(f"state_dict: must come from {type(self).__name__}, got one with the keys {keys}")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch counts them
            for name, its in zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False):
                if name != its:
                    raise ValueError(
                        f"state_dict: must name tensors as here, since noise is drawn by name, got {its!r} for {name!r}. "
                        "Pass named_parameters() of the model as it was, wrapped or not."
                    )
        super().load_state_dict(state_dict)
        self._current()
        self.step_count = own["step_count"]
        self.strategy.load(own)
        self._load_more(own)
        self.zero_grad()

    def _more_state(self) -> dict[str, Any]:
        """What goes on with a run, beside the strategy's."""
        return {}

    def _load_more(self, own: dict[str, Any]) -> None:
        """Put back what `_more_state` gave."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies; torch's own keeps parameters and options alone. Schedulers put a `step` of theirs on the object."""
        own = {name: value for name, value in self.__dict__.items() if name != "step" and not name.endswith("_hooks")}
        return {**own, "before_apply": None, "move": None}
