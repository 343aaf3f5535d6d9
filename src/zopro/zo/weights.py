"""Named tensors and the directions they may go: whoever holds them forms displaced ones, and takes recorded steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable

import torch
from torch import Tensor, nn

from zopro.errors import Diverged
from zopro.zo import fused
from zopro.zo import groups as grouped
from zopro.zo.directions import Directions
from zopro.zo.displacement import Displacement, query_seed
from zopro.zo.drawn import Drawn
from zopro.zo.groups import Entry, Group
from zopro.zo.moments import Moments
from zopro.zo.monitor import ResolutionMonitor
from zopro.zo.perturbation import Offset, Perturbation, choose, displaced
from zopro.zo.records import StepRecord

LARGEST = 1e9  # change of a weight in one step, in units of z, beyond which there is a mistake


class Weights:
    """What a `Displacement` displaces and a `StepRecord` moves.

    An optimiser over a model holds the model's own parameters; an engine that serves adapters holds a copy of them, and
    both make the same bits of the same numbers.

    Args:
        groups: parameter groups as torch keeps them; a record and a displacement have numbers for each.
        directions: where z comes from.
        perturbation: how a model reads displaced tensors, a name in `zopro.zo.perturbation`.

    Attributes:
        left_out: names of tensors that stay as they are.
        moments: what records with momentum or an anchor need of those before them.
    """

    def __init__(self, groups: list[Group], directions: Directions, perturbation: str = "auto") -> None:
        self.groups, self.directions, self.perturbation = groups, directions, perturbation
        self.free: list[Tensor] = []  # plain tensors that never required grad: nobody has frozen them
        self.left_out: Collection[str] = ()
        self.resolution = ResolutionMonitor()
        self._drawn = Drawn()
        self.moments = Moments()

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]], directions: Directions, perturbation: str = "auto") -> Weights:
        """Of (name, tensor) pairs in one group. Raises ValueError where the directions do not fit them."""
        pairs = list(named)
        group = {"params": [tensor for _, tensor in pairs], "param_names": [name for name, _ in pairs]}
        weights = cls([group], directions, perturbation)
        weights.add_free(group)
        directions.check([(name, tensor) for name, tensor, _ in weights.movable])
        return weights

    def add_free(self, group: Group) -> None:
        """Look for plain tensors in a new group, whose requires_grad says nothing from now on."""
        self.free += [p for p in group["params"] if not (p.requires_grad or isinstance(p, nn.Parameter))]

    @property
    def movable(self) -> list[Entry]:
        """Those that are not frozen."""
        return grouped.movable(self.groups, self.free)

    @property
    def entries(self) -> list[Entry]:
        """Those that are displaced: neither frozen nor left out."""
        return [entry for entry in self.movable if entry[0] not in self.left_out]

    def offset(self, displacement: Displacement) -> Offset:
        """t eps z by the index of a tensor in `entries`: fp32, a new tensor at each call."""
        return _Offsets(self, displacement)

    def factors(self, displacement: Displacement) -> Callable[[int], tuple[Tensor, Tensor] | None]:
        """A (m, r) and B (n, r) of which `offset` is A B^T, where they have fewer numbers than it; else None."""
        entries, place, seed = self.entries, self._places(), displacement.direction_seed

        def factors(index: int) -> tuple[Tensor, Tensor] | None:
            name, tensor, group = entries[index]
            found = self.directions.factors(name, tensor, seed, displacement.step)
            if found is None or sum(factor.numel() for factor in found) >= tensor.numel():
                return None
            return found[0] * (displacement.t * displacement.eps[place[id(group)]]), found[1]

        return factors

    def scale(self, displacement: Displacement) -> float:
        """Root mean square of the entries of t eps z; 1 for a direction of 0."""
        tensors, offset = [tensor for _, tensor, _ in self.entries], self.offset(displacement)
        square = sum(float(offset(index).square().sum()) for index in range(len(tensors)))
        return math.sqrt(square / max(1, sum(tensor.numel() for tensor in tensors))) or 1.0

    def at(self, displacement: Displacement) -> dict[str, Tensor]:
        """The displaced tensors as new ones, for an engine that has its policies by their files."""
        offset, entries = self.offset(displacement), self.entries
        made = {name: displaced(tensor, offset(index)) for index, (name, tensor, _) in enumerate(entries)}
        return {name: made.get(name, tensor.detach()) for name, tensor, _ in grouped.named(self.groups)}

    def reading(self) -> Perturbation:
        """A way for a model that has these tensors to read displaced ones."""
        return choose(self.perturbation, [tensor for _, tensor, _ in self.entries])

    @torch.no_grad()
    def apply(self, record: StepRecord) -> None:
        """theta <- theta - lr (g z + weight_decay theta), in place; of the same record always to the same bits.

        What is frozen stays, as does what stayed when the step was taken. A record with momentum, a second moment or an
        anchor is one of a series, which begins with step 0: the same bits of the same series.
        """
        self.moments.begin(record)
        if record.skipped:
            return
        still, place = set(record.left_out), self._places()
        seeds = [query_seed(query, record.seed) for query in range(len(record.coefficients))]
        moving = [entry for entry in self._recorded(record) if entry[0] not in still]
        estimates = self._estimates(record, moving, seeds)
        for name, tensor, group in [] if self._applied_at_once(record, moving, seeds) else moving:
            g = place[id(group)]
            lr = record.learning_rates[g]
            wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))  # itself if it is wide
            self.moments.anchored_(name, tensor, wide, record.anchor)
            if record.weight_decay[g] and tensor.dim() >= 2:
                wide.mul_(1 - lr * record.weight_decay[g])
            if name in estimates:
                into = estimates.pop(name)
            else:
                into, scale = (torch.zeros_like(wide), 1.0) if record.has_moments else (wide, -lr)
                for seed, coefficient in zip(seeds, record.coefficients, strict=True):
                    z = self._drawn.tensor(self.directions, name, tensor, seed, record.step)
                    into.add_(z, alpha=scale * coefficient * record.eps[0] / record.eps[g])
            if record.has_moments:
                wide.sub_(self.moments.smoothed(name, into, record), alpha=lr)
            if wide.dtype != tensor.dtype:
                self.resolution.see(tensor.detach(), wide)
                tensor.detach().copy_(wide)
        self._drawn.forget()
        torch.clear_autocast_cache()  # an autocast around the step may hold casts of the old values

    def _estimates(self, record: StepRecord, moving: list[Entry], seeds: list[int]) -> dict[str, Tensor]:
        """sum_q g_q z_q of each tensor for a step with moments, in a few kernels where they wait for each; else none."""
        if not record.has_moments:
            return {}
        named, place = [(name, tensor) for name, tensor, _ in moving], self._places()
        found: list[Tensor] = []
        for seed, coefficient in zip(seeds, record.coefficients, strict=True):
            z = self._drawn.tensors(self.directions, named, seed, record.step)
            if z is None:
                return {}
            factors = [coefficient * record.eps[0] / record.eps[place[id(group)]] for *_, group in moving]
            if not found:
                found = fused.scaled(z, factors)
            else:
                fused.step(found, fused.scaled(z, factors), 1.0)
        return {name: estimate for (name, _), estimate in zip(named, found, strict=False)}

    def _applied_at_once(self, record: StepRecord, moving: list[Entry], seeds: list[int]) -> bool:
        """A step without memory, of all tensors in a few kernels where they wait for each; else nothing is done."""
        if record.has_moments or record.anchor:
            return False
        named = [(name, tensor) for name, tensor, _ in moving]
        if (first := self._drawn.tensors(self.directions, named, seeds[0], record.step)) is None:
            return False
        place = self._places()
        members = [[i for i, entry in enumerate(moving) if place[id(entry[2])] == g] for g in range(len(self.groups))]
        for g, lr in enumerate(record.learning_rates):
            if record.weight_decay[g]:
                matrices = [moving[i][1] for i in members[g] if moving[i][1].dim() >= 2]
                fused.shrink(matrices, 1 - lr * record.weight_decay[g])
        for query, (seed, coefficient) in enumerate(zip(seeds, record.coefficients, strict=True)):
            z = first if query == 0 else self._drawn.tensors(self.directions, named, seed, record.step)
            assert z is not None
            for g, lr in enumerate(record.learning_rates):
                alpha = -lr * coefficient * record.eps[0] / record.eps[g]
                fused.step([moving[i][1] for i in members[g]], [z[i] for i in members[g]], alpha)
        return True

    def check(self, record: StepRecord) -> None:
        """Raise `Diverged` for a step that would leave tensors useless, or infinite in a narrow dtype."""
        place = self._places()
        for _, tensor, group in self._recorded(record):
            g = place[id(group)]
            lr = record.learning_rates[g]
            along = sum(abs(coefficient) for coefficient in record.coefficients) * record.eps[0] / record.eps[g]
            size = max(lr * max(1.0 if record.second_moment else along, record.weight_decay[g]), record.anchor)
            if not size < min(LARGEST, torch.finfo(tensor.dtype).max / 10):
                raise _TooFar(lr, size)

    def _recorded(self, record: StepRecord) -> list[Entry]:
        """What is movable in the groups that there were when the step was taken."""
        place = self._places()
        return [entry for entry in self.movable if place[id(entry[2])] < len(record.learning_rates)]

    def _places(self) -> dict[int, int]:
        return {id(group): index for index, group in enumerate(self.groups)}


class _TooFar(Diverged):
    """A step that no network would survive. In a run `zopro.errors.diverging` names the key in place of lr."""

    def __init__(self, lr: float, size: float) -> None:
        super().__init__(f"this step would change weights by about {size:.2g}")
        self.args = (
            f"lr: must leave weights that a network can work with, got {lr:g}, with which this step would change them by "
            f"about {size:.2g}. Lower the learning rate.",
        )


class _Offsets:
    """t eps z of `Weights.entries`, one by one or, where that is of use, all at once."""

    def __init__(self, weights: Weights, displacement: Displacement) -> None:
        self.weights, self.displacement, self.entries = weights, displacement, weights.entries
        place = weights._places()
        self.factors = [displacement.t * displacement.eps[place[id(group)]] for _, _, group in self.entries]

    def __call__(self, index: int) -> Tensor:
        name, tensor, _ = self.entries[index]
        seed, step = self.displacement.direction_seed, self.displacement.step
        z = self.weights._drawn.tensor(self.weights.directions, name, tensor, seed, step)
        return z.mul_(self.factors[index])

    def all(self) -> list[Tensor] | None:
        """As `zopro.zo.perturbation.Offsets` has it."""
        named = [(name, tensor) for name, tensor, _ in self.entries]
        seed, step = self.displacement.direction_seed, self.displacement.step
        z = self.weights._drawn.tensors(self.weights.directions, named, seed, step)
        return None if z is None else fused.scaled(z, self.factors)
