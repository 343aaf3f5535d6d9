"""Whether the sweep over a model's blocks is the gradient, and how it has to be made: tried once, on a few tokens."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import evaluating, refusing
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.trials import has_states
from zopro.errors import InputError

if TYPE_CHECKING:
    from zopro.engine.feedback import Feedback

EXACT, ROUNDED = 1e-2, 0.2  # largest relative differences from the gradient
WEIGHTS = (1.0, -0.5, 0.7, -1.2)  # of the answers' log-probs in the loss
PROMPT, ANSWER = 5, 3

logger = logging.getLogger(__name__)
_known: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def sweeps_alone(feedback: Feedback) -> bool:
    """Whether the sweep is the gradient only with each row by itself, since prompts leave more than keys and values.

    Raises:
        InputError: it is not the gradient then either, since blocks pass on more than the residual stream.
    """
    model = feedback.parts.model
    if model not in _known:
        tail, feedback.tail, feedback.exact = feedback.tail, 0, True
        try:
            with torch.enable_grad(), evaluating(model), refusing(model):
                _known[model] = _tried(feedback)
        finally:
            feedback.tail, feedback.exact = tail, False
        if _known[model]:
            kind = feedback.parts.config.model_type
            logger.warning("guide_local: the sweep over %s runs a prompt once for each of its answers", kind)
    return _known[model]


def _tried(feedback: Feedback) -> bool:
    parts = feedback.parts
    device = parts.model.get_input_embeddings().weight.device
    prompts = torch.arange(3, 3 + 2 * PROMPT).view(2, PROMPT).repeat_interleave(2, dim=0)
    answers = torch.arange(3, 3 + 4 * ANSWER).view(4, ANSWER) * 5
    ids = (torch.cat([prompts, answers], dim=1) % parts.config.vocab_size).to(device)
    batch = ids, torch.ones_like(ids), ANSWER
    weights = torch.tensor(WEIGHTS, device=device)[:, None]
    with torch.autocast(device.type, enabled=False):
        loss = (completion_logprobs(feedback.model, *batch) * weights).sum()
        found = torch.autograd.grad(loss, list(feedback.parameters.values()), allow_unused=True)
        true = {name: gradient for name, gradient in zip(feedback.parameters, found, strict=True) if gradient is not None}
        for feedback.alone in (False, True):
            # States that prompts leave would be held constant, which a model shows only once it is trained.
            if not feedback.alone and (has_states(parts) or not abilities(parts).shares):
                continue
            try:
                ours = feedback.gradients((feedback.logprobs(*batch, num_generations=2) * weights).sum())
            except torch.OutOfMemoryError:
                raise
            except Exception:  # the architecture's code does not go that way, for whatever reason
                continue
            if _agree(ours, true, EXACT if parts.model.dtype == torch.float32 else ROUNDED):
                return feedback.alone
    raise InputError(
        f"guide_local: block sweeps one stream from block to block, and those of {type(parts.model).__name__} pass on "
        "more than that. Use chain, or another method."
    )


def _agree(found: Mapping[str, Tensor], true: Mapping[str, Tensor], limit: float) -> bool:
    ours, theirs = (torch.cat([side[name].float().flatten() for name in true]) for side in (found, true))
    return bool((ours - theirs).norm() <= limit * theirs.norm())
