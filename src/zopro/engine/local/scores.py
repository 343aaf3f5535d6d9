"""A sequence classifier's score at the end of each sequence, with prompts that K completions share passed once."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import Decoder, evaluating
from zopro.engine.local.products import fast_products
from zopro.engine.local.shared import hidden_shared

_shareable: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


@torch.no_grad()
def shared_scores(
    model: Any, prompts: Sequence[Sequence[int]], endings: Sequence[Sequence[int]], num_generations: int
) -> Tensor:
    """Scores (B,) in fp32, read at each ending's last token.

    Args:
        model: a transformers sequence classifier with one label, or a PEFT model over one, for which `can_share` holds.
        prompts: B / K of them, none empty.
        endings: B, none empty; K consecutive ones follow each prompt.
        num_generations: K.
    """
    decoder = Decoder(*_parts(model))
    device = next(decoder.backbone.parameters()).device
    width, length = max(map(len, prompts)), max(map(len, endings))
    rows = [prompt for prompt in prompts for _ in range(num_generations)]
    pairs = list(zip(rows, endings, strict=True))
    ids = torch.tensor([[0] * (width - len(p)) + [*p, *e] + [0] * (length - len(e)) for p, e in pairs], device=device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * (len(p) + len(e)) + [0] * (length - len(e)) for p, e in pairs], device=device
    )
    with evaluating(decoder.model):
        hidden = hidden_shared(decoder, ids, mask, width, num_generations)
        ends = hidden[torch.arange(len(rows), device=device), mask[:, width:].sum(1)]
        return decoder.model.score(ends)[:, 0].float()


@torch.no_grad()
def can_share(model: Any) -> bool:
    """Whether the backbone's cache serves a prompt's answers, and the classifier is a `score` layer on its last states.

    The first is known from `zopro.engine.local.abilities`, the second is found out by comparing both.
    """
    classifier, _ = _parts(model)
    if classifier not in _shareable:
        able = abilities(Decoder(*_parts(model)))
        _shareable[classifier] = able.pads and able.shares and hasattr(classifier, "score") and _agrees(classifier, model)
    return _shareable[classifier]


@torch.no_grad()
def pads_right(model: Any) -> bool:
    """Whether a sequence's score is the same beside longer ones."""
    return abilities(Decoder(*_parts(model))).pads_right


def _parts(model: Any) -> tuple[Any, nn.Module]:
    classifier = model.get_base_model() if isinstance(model, PeftModel) else model
    return classifier, classifier.base_model


@torch.no_grad()
def _agrees(classifier: Any, model: Any) -> bool:
    pad = classifier.config.get_text_config().pad_token_id
    tokens = [token for token in range(4) if token != pad][:3]
    device = next(classifier.parameters()).device
    with evaluating(classifier), fast_products(classifier.dtype, device):
        ids = torch.tensor([tokens], device=device)
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, 0].float()
        shared = shared_scores(model, [tokens[:2]], [tokens[2:]], 1)
    return bool(torch.allclose(shared, expected, rtol=2e-2, atol=1e-3))
