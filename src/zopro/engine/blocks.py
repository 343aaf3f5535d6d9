"""Blocks of a decoder run once more, one at a time, on the tokens behind the prompts: their vector-Jacobian products.

While a pass runs, `BlockCalls` keeps what every block reads, (B, T, H) for T columns behind the shared prompts, and the
prompts' keys and values, one row a prompt. `vjp` then runs one block again from that, on a few sequences at a time, with
a graph that spans it alone. What a block reads of the prompts is held constant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import Cache, DynamicCache

from zopro.engine.shared import Select, Watch, read_as
from zopro.engine.stream import hooked
from zopro.errors import InputError
from zopro.zo.guided import local_rows, vjp_in_pieces

SAME = 2e-2  # relative difference of a block's two runs; bfloat16's rounding stays below


class BlockCalls(Watch):
    """What is needed to run each of `blocks`, in the order of the model, once more.

    Args:
        blocks: modules in a row, each fed what the one before gave.
        end: the module that reads the last one's output, where there is one.
        copies: K, sequences of each prompt.

    Attributes:
        inputs: (L + 1, B, T, H) of L blocks; the last is what `end` reads.
    """

    def __init__(self, blocks: Sequence[nn.Module], end: nn.Module | None, copies: int) -> None:
        self.blocks, self.end, self.copies = blocks, end, copies
        self.inputs = torch.empty(0)
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], bool]] = {}
        self._cache = DynamicCache()

    @property
    def elements(self) -> int:
        """Elements held."""
        kept = [part for layer in self._cache.layers for part in tree_leaves(vars(layer)) if isinstance(part, Tensor)]
        return self.inputs.numel() + sum(part.numel() for part in kept)

    def prompts(self, cache: DynamicCache) -> None:
        self._cache = cache

    @contextmanager
    def passing(self, select: Select) -> Iterator[None]:
        def keep(index: int) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                stream = args[0] if args else kwargs["hidden_states"]
                if not self.inputs.numel():  # one tensor for all: small ones would leave the heap in fragments
                    self.inputs = stream.new_empty(len(self.blocks) + 1, *stream.shape)
                self.inputs[index].copy_(stream)
                named = {name: _without_cache(value) for name, value in kwargs.items() if args or name != "hidden_states"}
                self._calls[index] = tuple(map(_without_cache, args[1:])), named, not args

            return hook

        watched = [*self.blocks, *([] if self.end is None else [self.end])]
        with hooked([m.register_forward_pre_hook(keep(i), with_kwargs=True) for i, m in enumerate(watched)]):
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
            given = self._run(index, stream, rows)
            self._check(index, given, rows)
            return given

        sequences = max(1, local_rows(cotangent.device) // cotangent.shape[1])
        back, gradients = vjp_in_pieces(run, self.inputs[index], cotangent, parameters, sequences)
        return back.float(), gradients

    def _run(self, index: int, stream: Tensor, rows: slice) -> Tensor:
        block, batch = self.blocks[index], self.inputs.shape[1]
        args, kwargs, named = self._calls[index]
        cache = read_as(self._cache, torch.arange(rows.start, rows.stop, device=stream.device) // self.copies)

        def part(value: Any) -> Any:
            if value is _CACHE:
                return cache
            return tree_map_only(Tensor, lambda t: t[rows] if t.dim() > 1 and len(t) == batch else t, value)

        kwargs = {name: part(value) for name, value in kwargs.items()}
        given = block(hidden_states=stream, **kwargs) if named else block(stream, *map(part, args), **kwargs)
        return given if isinstance(given, Tensor) else given[0]

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


_CACHE = object()  # stands for the cache among what a block was called with


def _without_cache(value: Any) -> Any:
    return _CACHE if isinstance(value, Cache) else value
