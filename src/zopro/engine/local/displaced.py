"""Log-probs of the same answers at many displacements in one pass of the base weights.

As `evaluation: together` has both sides of one direction, here all displacements of a step, of all its queries, go
through the network as `Members`: the rows once for each. It computes the same tokens as one pass after another; what is
saved is reading the weights, and on a GPU the launches of all passes but one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zopro.engine.batch import Batch
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_states, packed
from zopro.engine.local.members import Apart, Members
from zopro.engine.local.shared import Watch


class _Owners(Watch):
    """Tells members which of them each pass's rows belong to: (rows,) int64."""

    def __init__(self, members: Members, owners: Tensor) -> None:
        self.members, self.owners = members, owners

    def over(self, rows: Tensor) -> None:
        self.members.choose(self.owners[rows])


@torch.no_grad()
def members_logprobs(model: Any, batch: Batch, copies: int, temperature: float, members: Members) -> list[Tensor]:
    """Log-probs (B, C) of each member, up to rounding what `completion_logprobs` gives of a model displaced like it.

    Args:
        model: as in `completion_logprobs`.
        batch: of B rows, of which each `copies` share a prompt.
        copies: K.
        temperature: divides the logits.
        members: the displacements.

    Raises:
        Apart: they cannot go through the network together.
    """
    parts = causal_parts(model)
    if not abilities(parts).pads:
        raise Apart("rows of different lengths run one after another")
    ids, mask = (tensor.repeat(members.count, 1) for tensor in batch[:2])
    owners = torch.arange(members.count, device=ids.device).repeat_interleave(len(batch.input_ids))
    with members:
        states = completion_states(parts, ids, mask, batch.completion_length, copies, _Owners(members, owners))
        members.choose(owners.repeat_interleave(states.real.sum(1)))  # an output matrix gets tokens
        (tokens,) = packed(parts, states.hidden, states.targets, temperature, None, False)
    return list(states.unpacked(tokens).chunk(members.count))
