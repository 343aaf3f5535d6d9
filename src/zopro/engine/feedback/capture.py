"""What modules read and give while a backbone runs, at the positions that predict completion tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zopro.engine.feedback.stream import hooked
from zopro.engine.local.shared import Select, Watch


class Capture(Watch):
    """Keeps inputs and outputs at the positions that predict completion tokens; hooks are on during passes only.

    Rows are written where they stay, in tensors made before the first pass: small copies between what a pass allocates
    would leave the heap in fragments that no later pass can use.
    """

    whole = True

    def __init__(self) -> None:
        self._watched: dict[tuple[int, str], tuple[nn.Module, int, torch.dtype]] = {}
        self._seen = 0  # columns of `real` that earlier passes gave
        self.kept: dict[tuple[int, str], Tensor] = {}  # (module, side) -> (N, width)

    @property
    def elements(self) -> int:
        """Elements held."""
        return sum(tensor.numel() for tensor in self.kept.values())

    def inputs_of(self, module: nn.Module, width: int, dtype: torch.dtype) -> None:
        self._watched[id(module), "in"] = module, width, dtype

    def outputs_of(self, module: nn.Module, width: int, dtype: torch.dtype) -> None:
        self._watched[id(module), "out"] = module, width, dtype

    def expect(self, real: Tensor) -> None:
        self._real, self._seen = real, 0
        self._row = real.flatten().cumsum(0).sub(1).view_as(real)
        count = int(real.sum())
        for key, (_, width, dtype) in self._watched.items():
            self.kept[key] = torch.empty(count, width, dtype=dtype, device=real.device)

    @contextmanager
    def passing(self, select: Select) -> Iterator[None]:
        places: list[tuple[Tensor, Tensor]] = []  # of this pass: rows of its selection, and where they go
        columns = 0

        def hook(side: str, kept: Tensor) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, output: Any) -> None:
                nonlocal columns
                states = select(args[0] if side == "in" else output).detach()
                if not places:
                    columns = states.shape[1]
                    here = slice(self._seen, self._seen + columns)
                    real = self._real[:, here]
                    places.append((real.flatten().nonzero()[:, 0], self._row[:, here][real]))
                source, target = places[0]
                kept.index_copy_(0, target, states.flatten(0, 1).index_select(0, source).to(kept.dtype))

            return keep

        hooks = [
            module.register_forward_hook(hook(side, self.kept[id(module), side]))
            for (_, side), (module, _, _) in self._watched.items()
        ]
        with hooked(hooks):
            yield
        self._seen += columns
