"""One decoding step of all rows as one function without host reads: what a graph captures, and what runs without one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from zopro.engine.local.causal import CausalParts, Decoder
from zopro.engine.local.sampling import Sampler, next_tokens


@dataclass(frozen=True)
class Drawing:
    """How tokens are drawn and when a row ends; part of what a graph is captured for."""

    sampler: Sampler
    stops: tuple[int, ...]
    pad: int


@dataclass(frozen=True)
class State:
    """Where decoding stands: views of memory that stays, changed in place. R rows; C steps in all."""

    cache: Cache
    mask: Tensor  # (R, columns) bool: 0 on a prompt's padding; what lies ahead the causal mask hides
    token: Tensor  # (R,) drawn last, not yet read
    position: Tensor  # (R,) of it
    alive: Tensor  # (R,) bool
    row: Tensor  # (R,) of the result that each fills; the last one takes what nobody needs
    column: Tensor  # (1,) of the cache, where the token goes
    step: Tensor  # (1,) of C, drawn next
    uniform: Tensor  # (rows, C) fp64
    tokens: Tensor  # (rows, C), the result
    scores: Tensor  # (rows, C) fp32 log-probs
    counts: Tensor  # (rows,) tokens up to the stop


def read(parts: Decoder, state: State) -> Tensor:
    """Hidden states (R, H) of the tokens drawn last, which go into the cache."""
    hidden = parts.hidden(state.token[:, None], state.mask, state.position[:, None], state.cache)[:, -1]
    state.column.add_(1)
    state.position.add_(1)
    return hidden


def draw(parts: CausalParts, state: State, hidden: Tensor, how: Drawing, stops: Tensor) -> None:
    """The next token of each row after `hidden` (R, H); those that have ended write padding."""
    numbers = state.uniform[state.row, state.step]
    token, score = next_tokens(parts, how.sampler, hidden, numbers, on_host=False)
    state.tokens[state.row, state.step] = token.masked_fill(~state.alive, how.pad)
    state.scores[state.row, state.step] = score.masked_fill(~state.alive, 0.0)
    state.counts[state.row] += state.alive
    state.alive.logical_and_((token[:, None] != stops).all(-1))
    state.token.copy_(token)
    state.step.add_(1)


def decoding_step(parts: CausalParts, state: State, how: Drawing, stops: Tensor) -> None:
    """Read the last tokens, draw the next: the whole step."""
    draw(parts, state, read(parts, state), how, stops)
