"""Log-probs and their gradients from tiles of logits, against the whole matrix and autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from tiny import tiny_model, tiny_tokenizer
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.head import LIMITS, Limits, is_matrix, score_tokens, tiles


def gemma2() -> Any:
    """Its logits end in a soft cap."""
    config = Gemma2Config(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=5.0, initializer_range=0.2,
    )  # fmt: skip
    return Gemma2ForCausalLM(config).eval()


def hooked() -> Any:
    model = tiny_model("gpt2", tiny_tokenizer())
    model.get_output_embeddings().register_forward_hook(lambda module, args, output: 0.5 * output)
    return model


MODELS = {"softcap": gemma2, "gpt2": lambda: tiny_model("gpt2", tiny_tokenizer()), "a head with a hook": hooked}


@pytest.mark.parametrize("max_elements", [2**23, 1000, 40, 1])
@pytest.mark.parametrize("name", MODELS)
def test_equal_the_whole_matrix_and_autograd(name: str, max_elements: int) -> None:
    """One tile, several columns and rows of tiles, and less than a row."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = causal_parts(MODELS[name]().requires_grad_(False))
    assert is_matrix(parts.head) == (name != "a head with a hook")
    rows = 17 if max_elements > 1 else 3
    hidden = 3 * torch.randn(rows, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    picked = torch.arange(rows) * (299 // (rows - 1))  # in every block
    for temperature in (1.0, 0.7):
        expected = (parts.logits(hidden) / temperature).log_softmax(-1).gather(-1, picked[:, None])[:, 0]
        (gradient,) = torch.autograd.grad(expected.sum(), hidden)
        for errors in (False, True):
            scores, found = score_tokens(
                parts, hidden.detach(), picked, temperature, errors=errors, max_elements=max_elements
            )
            assert torch.allclose(scores, expected.detach(), atol=1e-5)
            assert found is None if not errors else torch.allclose(found, gradient, atol=1e-5)


def test_logits_of_any_size_are_carried_from_block_to_block() -> None:
    """The largest logit comes last and is so large that those before count for nothing, and the other way round."""
    model = tiny_model("llama", tiny_tokenizer(), tie_word_embeddings=False).requires_grad_(False)
    parts = causal_parts(model)
    vocabulary = parts.config.vocab_size
    for order in (1, -1):
        model.lm_head.weight[:] = 0
        model.lm_head.weight[:, 0] = torch.linspace(-200, 200, vocabulary) * order
        hidden = torch.zeros(2, model.config.hidden_size)
        hidden[:, 0] = 1
        picked = torch.tensor([0, vocabulary - 1])
        scores, _ = score_tokens(parts, hidden, picked, 1.0, max_elements=50)
        expected = parts.logits(hidden).double().log_softmax(-1).gather(-1, picked[:, None])[:, 0]
        assert torch.allclose(scores.double(), expected, rtol=1e-5, atol=1e-5)


def test_no_tokens_at_all() -> None:
    parts = causal_parts(tiny_model("llama", tiny_tokenizer()))
    scores, errors = score_tokens(parts, torch.empty(0, 32), torch.empty(0, dtype=torch.long), 1.0, errors=True)
    assert scores.shape == (0,) and errors is not None and errors.shape == (0, 32)


@pytest.mark.parametrize("rows", [1, 7, 512, 5000])
@pytest.mark.parametrize("vocabulary", [1, 300, 262144])
@pytest.mark.parametrize("limit", [1, 1000, 2**23, None])
@pytest.mark.parametrize("device", LIMITS)
def test_tiles_keep_the_limit(rows: int, vocabulary: int, limit: int | None, device: str) -> None:
    of_device = LIMITS[device]
    height, width = tiles(rows, vocabulary, of_device, limit)
    assert 1 <= height <= rows and 1 <= width <= vocabulary
    assert height * width <= min(limit or of_device.elements, of_device.tile_elements)


def test_the_tiles_of_a_gpu_give_the_same_log_probs(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, draw = causal_parts(tiny_model("llama", tiny_tokenizer())), torch.Generator().manual_seed(0)
    hidden, picked = torch.randn(40, 32, generator=draw), torch.randint(300, (40,), generator=draw)
    expected = parts.logits(hidden).log_softmax(-1).gather(-1, picked[:, None])[:, 0]
    for limit in (LIMITS["cuda"], Limits(2**10, 7, 2**9)):
        monkeypatch.setitem(LIMITS, "cpu", limit)
        scores, _ = score_tokens(parts, hidden, picked, 1.0)
        torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)
