"""Evaluations at displacements that can be compared: the same random state, no stale casts of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import torch
from torch import Tensor

from zopro.zo.displacement import Displacement
from zopro.zo.perturbation import Perturbation
from zopro.zo.together import Together
from zopro.zo.weights import Weights

Closure = Callable[[], Any]  # () -> scalar loss, a tensor or a float
T = TypeVar("T")


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.mps.get_rng_state() if device.type == "mps" else torch.cuda.get_rng_state(device)


def _set_random_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


class Evaluator:
    """What functions of the displaced tensors return, all under the random state that the caller had at construction.

    Dropout so draws the same mask at theta + t eps z and theta - t eps z. The state is only ever put back to what the
    caller had, never reseeded: after an evaluation it is where one call of the function leaves it.

    Args:
        weights: what is displaced.
        together: reads both sides of a direction in one pass; None: everything one after another.

    Attributes:
        watch: in place of a plain call of the function, if it is given (`zopro.zo.reads`).
    """

    def __init__(self, weights: Weights, together: Together | None = None) -> None:
        self.weights, self.together = weights, together
        self.reading = weights.reading()
        if together is not None:
            together.begin(self.reading.parameters)
        self.watch: Callable[[Closure], Any] | None = None
        self._cpu = torch.get_rng_state()
        devices = {tensor.device for tensor in self.reading.parameters if tensor.device.type in ("cuda", "mps")}
        self._there = {device: _random_state(device) for device in devices}

    def results(
        self, function: Callable[[], Any], at: Sequence[Displacement | None], read: Callable[[Any], T]
    ) -> list[T]:
        """`read(function())` at each displacement (None: theta); `read` may not put off reading a parameter."""
        found, ways = list[T](), self._ways(at)
        for displacement, way in zip(at, ways, strict=True):
            self.begin()
            try:
                if displacement is None or displacement.t == 0:
                    found.append(read(self._call(function)))
                else:
                    with way.at(self.weights.offset(displacement)):
                        found.append(read(self._call(function)))
            finally:
                torch.clear_autocast_cache()
        return found

    def _ways(self, at: Sequence[Displacement | None]) -> list[Perturbation]:
        """Of reading: together where a displacement is followed by its mirror image."""
        ways: list[Perturbation] = [self.reading] * len(at)
        index = 0
        while self.together is not None and index + 1 < len(at):
            first = at[index]
            pair = first is not None and first.t != 0 and at[index + 1] == first.mirrored
            if pair:
                ways[index] = ways[index + 1] = self.together
            index += 2 if pair else 1
        return ways

    def begin(self) -> None:
        """Put the random state back to the caller's."""
        torch.set_rng_state(self._cpu)
        for device, state in self._there.items():
            _set_random_state(device, state)
        torch.clear_autocast_cache()  # an autocast around the step would hand out casts made before the displacement

    def drew(self) -> bool:
        """Whether random numbers have been drawn since `begin`."""
        states = [(torch.get_rng_state(), self._cpu), *((_random_state(d), state) for d, state in self._there.items())]
        return not all(torch.equal(now, before) for now, before in states)

    def _call(self, function: Callable[[], Any]) -> Any:
        try:
            return function() if self.watch is None else self.watch(function)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise RuntimeError(
                    "closure: must need no gradient, as no graph is built. Return loss or rewards without backward(); "
                    "where a gradient is part of them, take torch.enable_grad() and perturbation='in_place'."
                ) from error
            raise


def one_number(loss: Any) -> float:
    """What a closure returned. Raises ValueError: it is not one number."""
    if not isinstance(loss, Tensor):
        with suppress(TypeError, ValueError):
            return float(loss)
    elif loss.numel() == 1:
        return float(loss)
    got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    raise ValueError(f"closure: must return one number, the loss, got {got}. Return the mean over the batch.")
