"""The host's part of decoding: which bucket runs, and every few tokens a look at who has ended.

Same tokens for the same uniform numbers as the plain loop (`zopro.engine.local.rollouts`), which runs where a model
cannot do this: one line says why.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from zopro.engine.gpu.graphs import Graphs, Uncaptured, only_now, signature, watched
from zopro.engine.gpu.memory import Memory, Shape, bucket, reaching
from zopro.engine.gpu.step import Drawing, State, decoding_step, draw, read
from zopro.engine.gpu.trial import why_not
from zopro.engine.local.abilities import Abilities
from zopro.engine.local.causal import CausalParts
from zopro.engine.local.growing import growing_cache
from zopro.engine.local.prefix import Owners, read_prompts

DEVICES = {"cuda"}  # where `generate` decodes this way
OFF = "ZOPRO_CUDA_GRAPHS"  # environment variable: 0 turns it off
LOOK = 16  # steps between two looks at who has ended
SPARE = 0.5  # share of the memory beside weights that must be free to hold keys and values while nothing is decoded

logger = logging.getLogger(__name__)


class Fixed:
    """Decoding of one model with a cache of fixed size; memory and graphs are kept for the next batch."""

    def __init__(self, parts: CausalParts) -> None:
        device = parts.model.get_input_embeddings().weight.device
        self.graphs = (Graphs if device.type == "cuda" else Uncaptured)(device)
        self._memory: Memory | None = None
        self._stops: dict[tuple[int, ...], Tensor] = {}
        self._settled: dict[object, Tensor] = {}
        self.why_not = why_not(parts, self.graphs)

    def decode(
        self,
        parts: CausalParts,
        ids: Tensor,
        mask: Tensor,
        copies: int,
        how: Drawing,
        uniform: Tensor,
        owners: Owners | None = None,
        prefix: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Go on from prompts (n, P), padded on the left, `copies` times each, by `uniform` (n * K, C), fp64.

        Of several displaced policies `owners` has the one of each prompt (n,), which reads the `prefix` tokens that all
        begin with once. Their rows all stay to the end: which rows go together is part of a graph.

        Returns:
            Tokens and log-probs (n * K, C) and lengths (n * K,): views, good until the next batch.
        """
        rows, steps = uniform.shape
        shape, stops = Shape.of(rows, ids.shape[1], steps), self._stopping(how.stops, ids.device)
        memory, hidden = self._begin(parts, ids, mask, copies, uniform, shape, how.pad, owners, prefix)
        same: Hashable = signature(parts.model)
        if owners is not None:
            same = same, owners[0].settle(self._settled)
        draw(parts, memory.state(rows, shape.columns, shape.columns), hidden, how, stops)
        done, end = 1, ids.shape[1]  # steps done; columns read
        while done < steps:
            living = memory.living(rows)
            if len(living) == 0:
                break
            if owners is None and (smaller := bucket(len(living))) < rows:
                memory.keep(living, rows, smaller, shape.columns, end)
                rows = smaller
            times = min(LOOK, steps - done)
            done, end = done + times, end + times
            seen = min(shape.columns, reaching(end))
            state = memory.state(rows, shape.columns, seen)
            key = same, how, shape.columns, rows, seen
            self.graphs.run(key, lambda state=state: decoding_step(parts, state, how, stops), times)  # type: ignore[misc]
        if self.graphs.why_not:
            say(parts, f"a step of it cannot be captured ({self.graphs.why_not})")
        return memory.tokens[: len(uniform), :steps], memory.scores[: len(uniform), :steps], memory.counts[: len(uniform)]

    def passes(self, parts: CausalParts, ids: Tensor, mask: Tensor, copies: int, steps: int) -> None:
        """The bare passes of `decode`, backbone and head, without drawing: what a benchmark compares it with."""
        shape = Shape.of(len(ids) * copies, ids.shape[1], steps)
        nothing = torch.zeros(shape.rows, steps, device=ids.device)
        memory, hidden = self._begin(parts, ids, mask, copies, nothing, shape, pad=0)
        parts.output(hidden.contiguous())
        same = signature(parts.model)
        for done in range(1, steps, LOOK):
            times = min(LOOK, steps - done)
            seen = min(shape.columns, reaching(ids.shape[1] + done - 1 + times))
            state = memory.state(shape.rows, shape.columns, seen)

            def step(state: State = state) -> Tensor:
                return parts.output(read(parts, state).contiguous())

            self.graphs.run((same, "passes", shape.columns, shape.rows, seen), step, times)

    def _begin(
        self,
        parts: CausalParts,
        ids: Tensor,
        mask: Tensor,
        copies: int,
        uniform: Tensor,
        shape: Shape,
        pad: int,
        owners: Owners | None = None,
        prefix: int = 0,
    ) -> tuple[Memory, Tensor]:
        """Read the prompts once each; memory that stands behind them, and hidden states (n * K, H) of their ends."""
        prompts = growing_cache(parts.model.config)
        hidden, mask = read_prompts(parts, ids, mask, copies, prompts, owners, prefix)
        memory = self._room(prompts, shape, ids.device)
        memory.begin(prompts, mask, copies, uniform, shape, pad)
        return memory, hidden

    def _room(self, prompts: DynamicCache, shape: Shape, device: torch.device) -> Memory:
        """Memory that fits; a larger one takes the place of one that does not."""
        if self._memory is None or not self._memory.fits(prompts, shape):
            before = (0, 0, 0) if self._memory is None else self._memory.size
            self.rest()
            with torch.inference_mode(False):  # whose tensors are of use there alone
                self._memory = Memory(prompts, shape, device, before)
        return self._memory

    def _stopping(self, stops: tuple[int, ...], device: torch.device) -> Tensor:
        """At one address for all graphs."""
        if stops not in self._stops:
            with torch.inference_mode(False):
                self._stops[stops] = torch.tensor(stops, dtype=torch.long, device=device)
        return self._stops[stops]

    def rest(self) -> None:
        """Give memory back, and the graphs that go by it."""
        self.graphs.clear()
        self._settled.clear()
        self._memory = None


_known: weakref.WeakKeyDictionary[nn.Module, Fixed] = weakref.WeakKeyDictionary()
_said: set[str] = set()


@contextmanager
def fixed_decoding(parts: CausalParts, able: Abilities) -> Iterator[Fixed | None]:
    """Around the batches of one call: decoding with a cache of fixed size, or None where the plain loop is to run."""
    device = parts.model.get_input_embeddings().weight.device
    if device.type not in DEVICES or os.environ.get(OFF) == "0" or not able.decodes:
        yield None
        return
    if parts.model not in _known and not only_now():
        with torch.inference_mode(False), torch.no_grad():
            _known[parts.model] = Fixed(parts)
    fixed = _known.get(parts.model)
    reason = only_now() or ("" if fixed is None else fixed.why_not) or _watched(parts)
    if fixed is None or reason:
        say(parts, reason)
        yield None
        return
    try:
        yield fixed
    except BaseException:
        fixed.rest()
        raise
    if device.type == "cuda" and is_scarce(device, parts.model):
        fixed.rest()


def is_scarce(device: torch.device, model: nn.Module) -> bool:
    """Whether the passes between two calls may need what is held."""
    free, total = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return free + cached < SPARE * (total - weights)


def _watched(parts: CausalParts) -> str:
    name = watched(parts.model)
    return name and f"{name} has a hook, which a replay would not call"


def say(parts: CausalParts, reason: str) -> None:
    """Once for each reason."""
    line = (
        f"model: {parts.config.model_type} decodes without CUDA graphs, since {reason}; every token waits for the host."
    )
    if line not in _said:
        _said.add(line)
        logger.warning(line)
