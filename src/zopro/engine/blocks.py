"""Blocks of a decoder run once more, one at a time, on the tokens behind the prompts: their vector-Jacobian products.

While a pass runs, `BlockCalls` keeps what every block reads, (B, T, H) for T columns behind the shared prompts, and the
prompts' keys and values, one row a prompt. `vjp` then runs one block again from that, on a few sequences at a time, with
a graph that spans it alone. What a block reads at the prompts' tokens is held constant; the keys and values that it makes
of that are not, so that what makes them learns from every token that the answers look at.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from zopro.engine.calls import Calls
from zopro.engine.shared import Select, Watch, read_as, read_layer
from zopro.errors import InputError
from zopro.zo.guided import local_rows, vjp_in_pieces

SAME = 2e-2  # relative difference of a block's two runs; bfloat16's rounding stays below
PROMPTS_DTYPE = torch.bfloat16  # of what is kept of the prompts' stream: gradients alone are taken from it


class BlockCalls(Watch):
    """What is needed to run each of `blocks`, in the order of the model, once more.

    Args:
        blocks: modules in a row, each fed what the one before gave.
        end: the module that reads the last one's output, where there is one.
        copies: K, sequences of each prompt.
        config: of the model, which says what a cache holds.

    Attributes:
        inputs: (L + 1, B, T, H) of L blocks; the last is what `end` reads.
    """

    def __init__(self, blocks: Sequence[nn.Module], end: nn.Module | None, copies: int, config: Any) -> None:
        self.blocks, self.end, self.copies, self.config = blocks, end, copies, config
        self._answers = Calls([*blocks, *([] if end is None else [end])])
        self._prompts = Calls(blocks, PROMPTS_DTYPE)
        self._cache = DynamicCache()

    @property
    def inputs(self) -> Tensor:
        return self._answers.inputs

    @property
    def elements(self) -> int:
        """Elements held."""
        kept = [part for layer in self._cache.layers for part in tree_leaves(vars(layer)) if isinstance(part, Tensor)]
        return self.inputs.numel() + self._prompts.inputs.numel() + sum(part.numel() for part in kept)

    def prompts(self, cache: DynamicCache) -> None:
        self._cache = cache

    @contextmanager
    def prefilling(self) -> Iterator[None]:
        with self._prompts.watching():
            yield

    @contextmanager
    def passing(self, select: Select) -> Iterator[None]:
        with self._answers.watching():
            yield

    def vjp(self, index: int, cotangent: Tensor, parameters: Sequence[Tensor] = ()) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Vector-Jacobian products of one block.

        Args:
            index: which of `blocks`.
            cotangent: (B, T, H), the gradient of the loss with respect to what the block gives.
            parameters: tensors inside the block that require grad.

        Returns:
            The gradient with respect to what the block reads, (B, T, H) fp32, and those with respect to `parameters`.

        Raises:
            InputError: the block, run again, gives something else than in the pass.
        """

        def run(stream: Tensor, rows: slice) -> Tensor:
            given = self._answers.again(index, stream, rows, self._cache_of(index, rows))
            self._check(index, given, rows)
            return given

        sequences = max(1, local_rows(cotangent.device) // cotangent.shape[1])
        back, gradients = vjp_in_pieces(run, self.inputs[index], cotangent, parameters, sequences)
        return back.float(), gradients

    def _cache_of(self, index: int, rows: slice) -> DynamicCache:
        """The prompts' cache for some sequences, with the block's keys and values in the graph."""
        first, last = rows.start // self.copies, (rows.stop - 1) // self.copies + 1
        chosen = torch.arange(rows.start, rows.stop, device=self.inputs.device) // self.copies
        cache = read_as(self._cache, chosen)
        for number, *made in self._made(index, slice(first, last)):
            layer = copy.copy(self._cache.layers[number])
            layer.keys, layer.values = (
                _with_gradient(kept[first:last], again)
                for kept, again in zip((layer.keys, layer.values), made, strict=True)
            )
            cache.layers[number] = read_layer(layer, chosen - first)
        return cache

    def _made(self, index: int, prompts: slice) -> list[tuple[int, Tensor, Tensor]]:
        """Which layer of the cache, and the keys and values (b, heads, P, d) that the block makes of the prompts again.

        The block runs as far as there. Empty where no prompt went ahead, or the block has no keys and values.
        """
        if not self._prompts.inputs.numel():
            return []
        try:
            self._prompts.again(index, self._prompts.states(index, prompts), prompts, _Stopping(config=self.config))
        except _Made as made:
            return [made.found]
        return []

    def _check(self, index: int, given: Tensor, rows: slice) -> None:
        if index + 1 == len(self.blocks) and self.end is None:
            return
        expected = self.inputs[index + 1, rows].float()
        error = float((given.detach().float() - expected).norm() / expected.norm().clamp(min=1e-30))
        if not error <= SAME:
            raise InputError(
                f"guide_local: block runs every block twice, and number {index} of this model gives something else then "
                f"(relative difference {error:.2g}). Use chain."
            )


class _Made(Exception):
    """Carries keys and values out of a block that need not run to its end."""

    def __init__(self, layer: int, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.found = layer, keys, values


class _Stopping(DynamicCache):
    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        raise _Made(layer_idx, key_states, value_states)


def _with_gradient(kept: Tensor, again: Tensor) -> Tensor:
    """The numbers of `kept` (b, heads, P', d) with the gradient of `again`; a sliding window kept the last columns."""
    again = again[..., -kept.shape[-2] :, :]
    return kept + (again - again.detach())
