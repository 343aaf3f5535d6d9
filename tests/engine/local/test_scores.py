"""Shared-prompt scores against the classifier's own forward pass on each sequence alone."""

from __future__ import annotations

import pytest
import torch

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.local.models import sequence_classifier
from zopro.engine.local.scores import can_share, shared_scores

PROMPTS = [[5, 9, 7], [11, 4, 6, 8, 12, 30, 31, 32, 33, 34, 35, 36]]
ENDINGS = [[40, 41, 2], [42, 2], [43, 44, 45, 46, 2], [47, 48, 49, 2]]


def classifier(kind):
    tokenizer = tiny_tokenizer()
    return sequence_classifier(tiny_model(kind, tokenizer), tokenizer, seed=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_the_classifier_s_own_scores(kind):
    model = classifier(kind)
    assert can_share(model)
    rows = [[*PROMPTS[row // 2], *ending] for row, ending in enumerate(ENDINGS)]
    with torch.no_grad():
        expected = [float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows]
    assert shared_scores(model, PROMPTS, ENDINGS, 2).tolist() == pytest.approx(expected, abs=1e-5)


def test_each_prompt_passes_once(monkeypatch):
    model, tokens = classifier("llama"), []
    assert can_share(model)
    forward = type(model.base_model).forward

    def counted(self, input_ids=None, **kwargs):
        tokens.append(input_ids.numel())
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", counted)
    shared_scores(model, PROMPTS, ENDINGS, 2)
    assert tokens == [2 * 12, 4 * 5]


def test_another_kind_of_head_is_not_shared():
    model = classifier("llama")
    model.score.register_forward_hook(lambda module, inputs, output: output + inputs[0].shape[1])
    assert not can_share(model)
