"""The residual stream of a decoder: its blocks, the linear layers that write to it, and the norms on the way.

Nothing goes by the name of a class. One probe of a few tokens is watched by forward hooks, and the structure is what its
numbers say: blocks are modules in a row, each fed what the one before gave; a block's writes are the one or two outputs
inside it that add up to what it changed (times a factor, where an architecture scales its residuals); the layer behind a
write is the linear layer whose output that is, or whose output the write's norm takes in (sandwich norms).

    python -c "
    from transformers import LlamaConfig, LlamaForCausalLM
    from zopro.engine.feedback.stream import residual_stream
    config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    print([write.name for block in residual_stream(LlamaForCausalLM(config)).blocks for write in block.writes])"
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import CausalParts, causal_parts, evaluating
from zopro.errors import InputError
from zopro.zo.directions import there

PROBE_TOKENS = 8


@dataclass(frozen=True)
class Write:
    """A linear layer whose output is added to the stream: stream += scale * norm(layer(a)), norm often absent."""

    name: str  # of the layer, from the backbone
    layer: nn.Module
    norm: nn.Module | None
    scale: float


@dataclass(frozen=True)
class Branch:
    """A block's token-wise part (its MLP): stream += scale * norm(body(pre_norm(x))), of the stream x where it reads."""

    name: str
    reads: nn.Module  # the module whose input is x: pre_norm, or body where there is none
    pre_norm: nn.Module | None
    body: nn.Module
    norm: nn.Module | None
    scale: float

    def __call__(self, stream: Tensor) -> Tensor:
        """What the branch adds to the stream (n, H), given the stream (n, H)."""
        states = self.pre_norm(stream) if self.pre_norm is not None else stream
        states = self.body(states[None])[0]
        return self.scale * (self.norm(states) if self.norm is not None else states)


@dataclass(frozen=True)
class Block:
    """One block. The writes stand in the order in which they happen."""

    module: nn.Module
    writes: tuple[Write, ...]
    mlp: Branch | None  # None where no part of the block is found to be token-wise
    parallel: bool  # the MLP reads what the block was given, not what attention has added to it


@dataclass(frozen=True)
class ResidualStream:
    """The blocks of a backbone in order, and the norm between the last one and the output matrix."""

    parts: CausalParts
    blocks: tuple[Block, ...]
    final_norm: nn.Module | None


@dataclass(frozen=True)
class _Call:
    """One module's call in the probe: first tensors of the stream's shape, as (tokens, H)."""

    module: nn.Module
    name: str
    given: Tensor | None
    result: Tensor | None
    alone: bool  # called with one tensor and nothing else


def residual_stream(model: Any) -> ResidualStream:
    """Find the residual stream of a causal model, or of the model under its adapters.

    Raises:
        InputError: blocks or their writes cannot be made out: the architecture has no such stream, or is not
            a plain stack of blocks.
    """
    parts = causal_parts(model)
    abilities(parts)  # before anything looks on
    calls, last = _probe(parts)
    blocks = _blocks(parts, calls)
    end = calls[blocks[-1][1]].result
    norm = None
    if not _equal(end, last):
        inside = {id(module) for _, name in blocks for module in calls[name].module.modules()}
        found = [
            call.module
            for call in calls.values()
            if id(call.module) not in inside and _equal(call.given, end) and _equal(call.result, last)
        ]
        if not found:
            raise _no_stream(parts, "no norm leads from the last block to the output matrix")
        norm = found[0]
    return ResidualStream(parts, tuple(_block(parts, calls, name) for _, name in blocks), norm)


def _no_stream(parts: CausalParts, reason: str) -> InputError:
    return InputError(
        f"model: {type(parts.model).__name__} has no residual stream that can be followed ({reason}). "
        "Choose another method, or a decoder whose blocks add to one stream."
    )


def _first(values: Any, shape: tuple[int, ...]) -> Tensor | None:
    """The first tensor of that shape among values, a tensor or a collection of arguments or results."""
    if isinstance(values, Tensor):
        return values if tuple(values.shape) == shape else None
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            if isinstance(value, Tensor) and tuple(value.shape) == shape:
                return value
    return None


def is_adapted(module: nn.Module) -> bool:
    """Whether this is a linear layer under a LoRA adapter; what is inside counts as part of it."""
    return hasattr(module, "lora_A") and hasattr(module, "base_layer")


def _is_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return is_adapted(module) or (isinstance(weight, Tensor) and weight.dim() == 2)


@contextmanager
def hooked(hooks: list[Any]) -> Iterator[None]:
    """Remove the hooks on leaving."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _probe(parts: CausalParts) -> tuple[dict[str, _Call], Tensor]:
    """One pass over a few tokens: every module's call by name, in the order in which they ended, and the last states."""
    device = parts.model.get_input_embeddings().weight.device
    ids = (torch.arange(PROBE_TOKENS, device=device) * 7 % parts.config.vocab_size)[None]
    shape = (1, PROBE_TOKENS, parts.config.hidden_size)
    calls: dict[str, _Call] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given, result = (_first(values, shape) for values in ((*args, *kwargs.values()), output))
            if given is not None or result is not None:
                kept = [None if tensor is None else tensor[0].detach().clone() for tensor in (given, result)]
                alone = len(args) == 1 and not kwargs and isinstance(output, Tensor)
                calls[name] = _Call(module, name, kept[0], kept[1], alone)

        return hook

    adapted = [f"{name}." for name, module in parts.backbone.named_modules() if is_adapted(module)]
    hooks = [
        module.register_forward_hook(watch(name), with_kwargs=True)
        for name, module in parts.backbone.named_modules()
        if name and not name.startswith(tuple(adapted))
    ]
    with hooked(hooks), evaluating(parts.model):
        last = parts.hidden(ids, torch.ones_like(ids), torch.arange(PROBE_TOKENS, device=device)[None], None)[0]
    return calls, last


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def _blocks(parts: CausalParts, calls: dict[str, _Call]) -> list[tuple[nn.Module, str]]:
    """The longest list of modules each of which is fed what the one before gave."""
    found: list[tuple[nn.Module, str]] = []
    for prefix, modules in parts.backbone.named_modules():
        if not isinstance(modules, nn.ModuleList) or len(modules) <= len(found):
            continue
        names = [f"{prefix}.{index}" if prefix else str(index) for index in range(len(modules))]
        row = [calls.get(name) for name in names]
        if all(call is not None and call.result is not None for call in row) and all(
            _equal(before.result, after.given) for before, after in pairwise(row) if before and after
        ):
            found = list(zip(modules, names, strict=True))
    if not found:
        raise _no_stream(parts, "there is no row of blocks each fed what the one before gave")
    return found


def _block(parts: CausalParts, calls: dict[str, _Call], name: str) -> Block:
    block = calls[name]
    assert block.given is not None and block.result is not None
    inside: list[_Call] = []
    for call in calls.values():  # a container's output is often its last layer's: the layer ended first and is kept
        if call.name.startswith(f"{name}.") and call.result is not None:
            known = any(_equal(call.result, other.result) for other in inside)
            inside += [] if known else [call]
    chosen, scales = _summands(block, inside)
    writes, read = [], block.given
    mlp: Branch | None = None
    parallel = False
    for call, scale in zip(chosen, scales, strict=True):
        layer, norm = call, None
        if not _is_linear(call.module):
            sources = [other for other in inside if _is_linear(other.module) and _equal(other.result, call.given)]
            if not sources:
                continue  # written by something other than one linear layer, such as a mixture of experts
            layer, norm = sources[0], call.module
        writes.append(Write(layer.name, layer.module, norm, scale))
        branch, reads_input = _branch(calls, block, layer, norm, scale)
        if branch is not None:
            mlp, parallel = branch, reads_input
        assert call.result is not None
        read = read + call.result
    if not writes:
        raise _no_stream(parts, f"what {name!r} adds does not come from linear layers")
    return Block(block.module, tuple(writes), mlp, parallel)


def _summands(block: _Call, candidates: list[_Call]) -> tuple[list[_Call], list[float]]:
    """The one or two outputs, with their factors, that add up to what the block changed; none if nothing does."""
    assert block.given is not None and block.result is not None
    change = (there.in_float64(block.result) - there.in_float64(block.given)).flatten()
    rounding = (
        torch.finfo(block.result.dtype).eps * float(there.in_float64(block.result).norm()) / float(change.norm() or 1.0)
    )
    best: tuple[float, list[_Call], list[float]] = (max(1e-4, 2 * rounding), [], [])
    for count in (1, 2):
        for calls in combinations(candidates, count):
            columns = torch.stack(
                [there.in_float64(call.result).flatten() for call in calls if call.result is not None], dim=1
            )
            factors = torch.linalg.lstsq(columns, change[:, None], driver="gelsd" if columns.is_cpu else None).solution
            error = float((columns @ factors - change[:, None]).norm() / change.norm())
            if error < best[0] / (1 if count == 1 or not best[1] else 2):
                best = (error, list(calls), [_snapped(float(factor)) for factor in factors[:, 0]])
    return best[1], best[2]


def _snapped(factor: float) -> float:
    """1 where a fitted factor is 1 but for rounding."""
    return 1.0 if abs(factor - 1) < 2e-2 else factor


def _branch(
    calls: dict[str, _Call], block: _Call, layer: _Call, norm: nn.Module | None, scale: float
) -> tuple[Branch | None, bool]:
    """The token-wise part of the block that ends in `layer`, and whether it reads what the block was given."""
    child = layer.name.removeprefix(f"{block.name}.").split(".")[0]
    body = calls.get(f"{block.name}.{child}")
    if body is None or not body.alone or body.given is None or not _token_wise(body):
        return None, False
    before = [call for call in calls.values() if call.name.startswith(f"{block.name}.") and call.name != body.name]
    feeds = [call for call in before if call.result is not None and _equal(call.result, body.given)]
    pre = feeds[0] if feeds and not _is_linear(feeds[0].module) and feeds[0].alone else None
    start = pre if pre is not None else body
    branch = Branch(body.name, start.module, None if pre is None else pre.module, body.module, norm, scale)
    return branch, _equal(start.given, block.given)


@torch.no_grad()
def _token_wise(body: _Call) -> bool:
    """Whether a token's output depends on that token alone."""
    assert body.given is not None and body.result is not None
    was_training = [module for module in body.module.modules() if module.training]
    for module in was_training:
        module.training = False
    alone = body.module(body.given[None, -1:])[0, 0].float()
    for module in was_training:
        module.training = True
    together = body.result[-1].float() if body.result is not None else alone
    return bool(torch.allclose(alone, together, rtol=2e-2, atol=2e-2 * float(together.abs().max())))
