"""What a model's cache can be trusted with: found out once for a model, on a few tokens, against passes without a cache.

Attention leaves keys and values, which any number of answers can go on from. Recurrent and convolutional layers leave
states, and each architecture has its own idea of what they can be used for: some begin anew where several tokens follow a
prompt at once, some overwrite what back-propagation needs, some take padding for text. Nothing goes by the name of a
class. Two prompts with two answers each run every way that the engine runs them, and what differs from the plain pass
over each row is not used: `zopro.engine.local.logprobs`, `rollouts`, `scores` and `feedback` ask here.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass

import torch
from torch import nn

from zopro.engine.local.causal import Decoder, evaluating, refusing
from zopro.engine.local.growing import GrowingLayer, growing_cache
from zopro.engine.local.quantised import quantised
from zopro.engine.local.trials import Judge, decoded, has_states, padded, plain_passes, shared

NEVER = 2**31
UNTRIED = NEVER + 1  # of gradients through quantised weights, which function values have no use for

logger = logging.getLogger(__name__)
_known: weakref.WeakKeyDictionary[nn.Module, Abilities] = weakref.WeakKeyDictionary()
_reading: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_said: set[str] = set()


@dataclass(frozen=True)
class Abilities:
    """Which ways to run a model give what a plain pass over a row alone gives."""

    pads: bool = True  # beside longer rows, padded on both sides
    pads_right: bool = True  # padded on the right
    decodes: bool = True  # one token after another, from the cache of a prompt that answers share
    shares: bool = True  # several tokens at once from it
    gradients_from: int = 1  # least number of such tokens that gradients go back through; NEVER, UNTRIED: none

    def costs(self) -> str:
        """What it costs to go without the others, in words; empty where there are none."""
        costs = []
        if not self.pads:
            costs.append("rows of different lengths run one after another")
        if not self.decodes:
            costs.append("each new token reads the whole text again")
        if not self.shares:
            costs.append("a prompt runs once for each of its answers")
        elif self.gradients_from == NEVER:
            costs.append("with back-propagation a prompt runs once for each of its answers")
        return ", ".join(costs)


def abilities(parts: Decoder) -> Abilities:
    """What this model can do; it is tried the first time a model is seen, and one warning says what it costs.

    Through quantised weights gradients are tried only where autograd is on.

    Raises:
        InputError: its states at a token depend on later tokens or on other rows, are not finite, or cannot be had.
    """
    backward = torch.is_grad_enabled() or not quantised(parts.model)
    found = _known.get(parts.model)
    if found is None or (backward and found.gradients_from == UNTRIED):
        with refusing(parts.model):
            found = _try(parts, backward)
        _known[parts.model] = found
        line = f"model: {parts.config.model_type} cannot go on from its cache in every way, so {found.costs()}"
        if found.costs() and line not in _said:
            _said.add(line)
            logger.warning(line)
    return found


def reads_prefixes(parts: Decoder) -> bool:
    """Whether prompts can go on from a beginning that they share (`zopro.engine.local.prefix`); tried once."""
    if parts.model not in _reading:
        layers = growing_cache(parts.model.config).layers
        # Padding between two parts counts in a window; GPT-Neo's local layers have one of which the cache knows nothing.
        windows = any(type(layer) is not GrowingLayer for layer in layers) or hasattr(parts.config, "window_size")
        found = not windows and not has_states(parts)
        if found:
            device = parts.model.get_input_embeddings().weight.device
            with evaluating(parts.model), torch.autocast(device.type, enabled=False):
                found = Judge(parts, plain_passes(parts, device, gradients=False)).reads_beginnings()
        _reading[parts.model] = found
    return _reading[parts.model]


def _try(parts: Decoder, backward: bool) -> Abilities:
    device = parts.model.get_input_embeddings().weight.device
    with evaluating(parts.model), torch.autocast(device.type, enabled=False):
        plain = plain_passes(parts, device, backward)
        states = has_states(parts)
        judge = Judge(parts, plain)
        pads = judge.like(lambda: padded(parts, plain, left=True)) and (not states or judge.pads_states())
        groups = [plain] if pads else [[group] for group in plain]
        several, one = (not states or judge.keeps_states(step) for step in (None, 1))
        trained = backward and several and all(judge.gradients_like(group) for group in groups)
        # Of keys and values alone one token reads what several do; states are often taken on by other code.
        trained_by_one = trained and (not states or judge.gradients_like(plain[-1:]))
        untrained = (trained and not states) or judge.like(lambda: [r for group in groups for r in shared(parts, group)])
        return Abilities(
            pads=pads,
            pads_right=pads or judge.like(lambda: padded(parts, plain, left=False)),
            decodes=one and judge.like(lambda: [row for group in groups for row in decoded(parts, group)]),
            shares=several and untrained,
            gradients_from=1 if trained_by_one else 2 if trained else NEVER if backward else UNTRIED,
        )
