"""Blocks of a decoder run once more, one at a time: their vector-Jacobian products, by graphs that span one block.

While a pass runs, `BlockCalls` keeps what every block reads: of the prompts, one row for all their answers, and of what
runs behind them, one row an answer. `vjp` then runs one block again from that, a few prompts at a time. Two cases:

    the prompts' last `tail` tokens run with the answers   what a block reads at the tokens before is held constant, but
                                                           the keys and values that it makes of that are not
    the prompts run before the answers, all of them        nothing is held constant: the sweep gives the gradient

States other than keys and values (of convolutions, of recurrences) that prompts leave to answers would be held constant:
`zopro.engine.local.sweeps` finds the models that have them, whose rows run from end to end with nothing before them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from zopro.engine.feedback.calls import Calls
from zopro.engine.local.shared import Select, Watch, read_as, read_layer
from zopro.errors import InputError
from zopro.zo.guided import add_found, local_rows

SAME = 2e-2  # relative difference of a block's two runs; bfloat16's rounding stays below
PROMPTS_DTYPE = torch.bfloat16  # of what is kept of the prompts' stream: gradients alone are taken from it


@dataclass(frozen=True)
class Stream:
    """The residual stream, or gradients with respect to it, where something is swept: None where nothing is."""

    answers: Tensor | None  # (B, T, H)
    prompts: Tensor | None  # (B / K, P, H)

    def tensors(self) -> list[Tensor]:
        return [part for part in (self.answers, self.prompts) if part is not None]

    def each(self, function: Callable[[Tensor], Tensor]) -> Stream:
        return Stream(*(None if part is None else function(part) for part in (self.answers, self.prompts)))

    def part(self, rows: slice, group: slice) -> Stream:
        """Some sequences and their prompts."""
        return Stream(
            None if self.answers is None else self.answers[rows], None if self.prompts is None else self.prompts[group]
        )


class BlockCalls(Watch):
    """What is needed to run each of `blocks`, in the order of the model, once more.

    Args:
        blocks: modules in a row, each fed what the one before gave.
        end: the module that reads the last one's output, where there is one.
        copies: K, sequences of each prompt.
        config: of the model, which says what a cache holds.
        exact: keep what blocks read of the prompts in its own dtype.
    """

    whole = True

    def __init__(
        self, blocks: Sequence[nn.Module], end: nn.Module | None, copies: int, config: Any, exact: bool = False
    ) -> None:
        self.blocks, self.end, self.copies, self.config = blocks, end, copies, config
        watched = [*blocks, *([] if end is None else [end])]
        self._answers = Calls(watched)
        self._prompts = Calls(watched, None if exact else PROMPTS_DTYPE)
        self._cache = DynamicCache()
        self._ahead = False  # a pass over the prompts alone is going on
        self._whole = False  # such a pass takes them to their ends

    @property
    def elements(self) -> int:
        """Elements held."""
        kept = [part for layer in self._cache.layers for part in tree_leaves(vars(layer)) if isinstance(part, Tensor)]
        return sum(part.numel() for part in (self._answers.inputs, self._prompts.inputs, *kept))

    def prompts(self, cache: DynamicCache) -> None:
        self._cache = cache

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        self._ahead = True
        with self._prompts.watching():
            yield
        self._ahead = False

    @contextmanager
    def passing(self, select: Select) -> Iterator[None]:
        if self._ahead:
            self._whole = True
            yield
        else:
            with self._answers.watching():
                yield

    def ends(self, real: Tensor) -> Tensor:
        """What `end` read (N, H) where completion tokens are predicted, packed by `real` (B, C)."""
        seen = [self._answers.inputs[-1]] if self._answers.inputs.numel() else []
        if self._whole:
            seen.insert(0, self._prompts.states(-1, slice(None))[:, -1:].repeat_interleave(self.copies, dim=0))
        return torch.cat(seen, dim=1)[:, -real.shape[1] :][real]

    def spread(self, error: Tensor, real: Tensor) -> Stream:
        """Gradients (N, H) with respect to the last block's outputs there, at their places."""
        grid = torch.zeros(*real.shape, error.shape[1], device=error.device)
        grid[real] = error
        if not self._whole:
            return Stream(functional.pad(grid, (0, 0, self._answers.inputs.shape[2] - real.shape[1], 0)), None)
        prompts = torch.zeros(self._prompts.inputs.shape[1:], device=error.device)
        prompts[:, -1] = grid[:, 0].unflatten(0, (-1, self.copies)).sum(1)
        return Stream(grid[:, 1:] if real.shape[1] > 1 else None, prompts)

    def vjp(self, index: int, cotangent: Stream, parameters: Sequence[Tensor] = ()) -> tuple[Stream, tuple[Tensor, ...]]:
        """Vector-Jacobian products of one block.

        Args:
            index: which of `blocks`.
            cotangent: with respect to what the block gives, fp32.
            parameters: tensors inside the block that require grad.

        Returns:
            The gradients with respect to what the block reads, fp32, and those with respect to `parameters`.

        Raises:
            InputError: the block, run again, gives something else than in the pass.
        """
        back = cotangent.each(torch.empty_like)
        totals = tuple(torch.zeros_like(parameter) for parameter in parameters)
        for rows, group in self._pieces(cotangent):
            with torch.enable_grad():
                read = self._read(index, rows, group, cotangent)
                given = self._again(index, read, rows, group)
                upstream = cotangent.part(rows, group).tensors()
            gradients = torch.autograd.grad(
                given.tensors(),
                [*read.tensors(), *parameters],
                [one.to(output.dtype) for one, output in zip(upstream, given.tensors(), strict=True)],
                allow_unused=True,
            )
            targets = back.part(rows, group).tensors()
            for target, gradient in zip(targets, gradients, strict=False):
                target.copy_(gradient)
            add_found(totals, gradients[len(targets) :])
        return back, totals

    def _pieces(self, cotangent: Stream) -> Iterator[tuple[slice, slice]]:
        """Some sequences and their prompts at a time: as many tokens as a local graph takes, at least one prompt's."""
        tensors = cotangent.tensors()
        prompts = len(tensors[-1]) if cotangent.prompts is not None else len(tensors[0]) // self.copies
        tokens = 0 if cotangent.answers is None else self.copies * cotangent.answers.shape[1]
        if self._prompts.inputs.numel():
            tokens += self._prompts.inputs.shape[2]
        size = max(1, local_rows(tensors[0].device) // tokens)
        for first in range(0, prompts, size):
            last = min(first + size, prompts)
            yield slice(first * self.copies, last * self.copies), slice(first, last)

    def _read(self, index: int, rows: slice, group: slice, cotangent: Stream) -> Stream:
        """Leaves of a graph: what the block read where there is a cotangent."""
        answers = None if cotangent.answers is None else self._answers.states(index, rows)
        prompts = None if cotangent.prompts is None else self._prompts.states(index, group)
        return Stream(answers, prompts).each(lambda part: part.detach().requires_grad_())

    def _again(self, index: int, read: Stream, rows: slice, group: slice) -> Stream:
        """What the block gives, in a graph from what it reads and its parameters."""
        swept, made, answers = None, None, None
        if self._prompts.inputs.numel():
            states = self._prompts.states(index, group) if read.prompts is None else read.prompts
            recording = _Recording(stops=read.prompts is None, config=self.config)
            with suppress(_Stopped):
                swept = self._prompts.again(index, states, group, recording, self._answers)
            made = recording.made
        if read.answers is not None:
            answers = self._answers.again(index, read.answers, rows, self._cache_of(made, group), self._prompts)
            self._check(index, answers, rows)
        return Stream(answers, None if read.prompts is None else swept)

    def _cache_of(self, made: Made | None, group: slice) -> DynamicCache:
        """The prompts' cache for their sequences, with the gradient of the keys and values made again."""
        prompts = torch.arange(group.start, group.stop, device=self._answers.inputs.device)
        rows = prompts.repeat_interleave(self.copies)
        cache = read_as(self._cache, rows)
        if made is not None:
            layer = copy.copy(self._cache.layers[made.layer])
            layer.keys = _with_gradient(layer.keys[group], made.keys)
            layer.values = _with_gradient(layer.values[group], made.values)
            cache.layers[made.layer] = read_layer(layer, rows - group.start)
        return cache

    def _check(self, index: int, given: Tensor, rows: slice) -> None:
        if index + 1 == len(self.blocks) and self.end is None:
            return
        expected = self._answers.inputs[index + 1, rows].float()
        error = float((given.detach().float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= SAME:
            raise InputError(
                f"guide_local: block runs every block twice, and number {index} of this model gives something else then "
                f"(relative difference {error:.2g}). Use chain."
            )


@dataclass(frozen=True)
class Made:
    """Keys and values (b, heads, P, d) that a block made for a layer of the cache."""

    layer: int
    keys: Tensor
    values: Tensor


class _Stopped(Exception):
    """A block need not run on: what it makes for the cache is known."""


class _Recording(DynamicCache):
    """A cache of one block's one run, which stops there if asked to."""

    def __init__(self, stops: bool, config: Any) -> None:
        super().__init__(config=config)
        self.stops = stops
        self.made: Made | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        self.made = Made(layer_idx, key_states, value_states)
        if self.stops:
            raise _Stopped
        return key_states, value_states


def _with_gradient(kept: Tensor, again: Tensor) -> Tensor:
    """The numbers of `kept` (b, heads, P', d) with the gradient of `again`; a sliding window kept the last columns."""
    again = again[..., -kept.shape[-2] :, :]
    return kept + (again - again.detach())
