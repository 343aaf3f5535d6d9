"""Evaluating a trainer's loss without moving what the trainer counts, collects or adapts."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from zopro.zo.evaluation import Closure

_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


def stand_in(trainer: Any) -> Any:
    """A trainer to rehearse with: what it counts and collects stays its own."""
    other = object.__new__(type(trainer))
    other.__dict__.update({name: _copied(value) for name, value in vars(trainer).items()})
    return other


def _copied(value: Any) -> Any:
    if type(value) not in _CONTAINERS:
        return value
    other = value.copy()
    if isinstance(other, dict):
        for key, entry in other.items():
            other[key] = _copied(entry)
    return other


@contextmanager
def _collecting_nothing(trainer: Any) -> Iterator[None]:
    """Around evaluations: what the trainer collects in them, such as metrics for its log, is not kept."""
    state = vars(trainer)
    kept = {name: value for name, value in state.items() if type(value) in _CONTAINERS}
    state.update({name: _copied(value) for name, value in kept.items()})
    try:
        yield
    finally:
        state.update(kept)


def repeatable(trainer: Any, closure: Closure) -> Closure:
    """The closure with the trainer's counters set back before it is evaluated again.

    TRL counts tokens in the loss and adapts coefficients there: evaluations of one step see the same ones, and leave what
    one of them leaves. Of evaluations that look for eps, some far from theta, the log's metrics hear nothing.
    """
    changed: dict[str, Any] = {}

    def evaluate() -> Any:
        state = vars(trainer)
        state.update(changed)
        before = {
            name: value for name, value in state.items() if value is None or isinstance(value, int | float | Tensor)
        }
        looking = trainer.spsa.strategy.calibrating
        with _collecting_nothing(trainer) if looking else nullcontext():
            loss = closure()
        changed.clear()
        changed.update({name: value for name, value in before.items() if state.get(name) is not value})
        return loss

    return evaluate
