"""Whether a model can decode from a cache of fixed size: tried on a few tokens, as `zopro.engine.local.abilities` tries.

Nothing goes by the name of a class: experts that count their tokens on the host, rope that looks at the longest position,
states beside keys and values all show when the step runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zopro.engine.gpu.cache import Unsuited
from zopro.engine.gpu.graphs import Graphs
from zopro.engine.gpu.memory import Memory, Shape
from zopro.engine.gpu.step import read
from zopro.engine.local.causal import CausalParts, evaluating
from zopro.engine.local.growing import growing_cache
from zopro.engine.local.prefix import read_prompts
from zopro.engine.local.trials import COPIES, Judge, Plain, batch_of, plain_passes

MASKS = (torch.bool, torch.uint8)  # as an index: the places of its ones are looked for
INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
COPYING = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class HostRead(RuntimeError):
    """A step looked at a value, or moved one between devices."""


class NoHostReads(TorchDispatchMode):
    """Raises HostRead for what a graph cannot hold, on any device: so CPUs show what a GPU would refuse."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::")
        if by_values(func) and not (func in INDEXING and all(index.dtype not in MASKS for index in _indices(args))):
            raise HostRead(f"{name} waits for the host")
        result = func(*args, **(kwargs or {}))
        copies = func in COPYING  # others take numbers from a host, and leave some there that nobody reads
        leaves = [x for x in tree_leaves((args, kwargs or {}, result if copies else ())) if isinstance(x, Tensor)]
        if len({leaf.device for leaf in leaves if leaf.dim() or copies}) > 1:
            raise HostRead(f"{name} moves values between devices")
        return result


def by_values(func: Any) -> bool:
    """Whether what comes of it, or its size, is found by looking at values."""
    return bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))


def _indices(args: Any) -> list[Tensor]:
    return [index for index in args[1] if index is not None]


def why_not(parts: CausalParts, graphs: Graphs) -> str:
    """Why this model cannot; empty where it can.

    Two prompts with two answers each, some of which end early, are read token by token, on a GPU from a graph, and
    compared with plain passes.
    """
    device = parts.model.get_input_embeddings().weight.device
    with evaluating(parts.model), torch.autocast(device.type, enabled=False):
        plain = plain_passes(parts, device, gradients=False)
        try:
            with torch.no_grad():
                found = _decoded(parts, plain, graphs)
        except torch.OutOfMemoryError:
            raise
        except (HostRead, Unsuited) as error:
            return str(error)
        except Exception as error:  # whatever an architecture's code raises where it is run otherwise than it expects
            return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        finally:
            graphs.clear()
        if graphs.why_not:
            return graphs.why_not
        same = Judge(parts, plain).like(lambda: found)
    return "" if same else "it gives something else from a cache of fixed size"


def _decoded(parts: CausalParts, plain: list[Plain], graphs: Graphs) -> list[Tensor]:
    """As `zopro.engine.local.trials.decoded`; rows that have ended go on reading padding."""
    ids, mask, split = batch_of(plain, left=True)
    prompts, seen = growing_cache(parts.model.config), mask[::COPIES, :split]
    hidden, _ = read_prompts(parts, ids[::COPIES, :split], seen, COPIES, prompts)
    shape = Shape.of(len(ids), split, ids.shape[1] - split + 1)
    memory = Memory(prompts, shape, ids.device)
    memory.begin(prompts, seen, COPIES, torch.zeros(shape.rows, shape.steps, device=ids.device), shape, pad=0)
    state = memory.state(shape.rows, shape.columns, shape.columns)
    found = [hidden]
    latest = torch.empty_like(hidden)
    for column in range(split, ids.shape[1]):
        state.token.copy_(ids[:, column])
        with NoHostReads():
            graphs.run("trial", lambda: latest.copy_(read(parts, state)), 1)
        found.append(latest.clone())
    lengths = mask[:, split:].sum(1).tolist()
    return [row[: 1 + length] for row, length in zip(torch.stack(found, dim=1), lengths, strict=True)]
