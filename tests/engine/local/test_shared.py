"""Prompts shared by several completions: kept once, repeated a layer at a time, recurrent states included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, Lfm2Config, Lfm2ForCausalLM

from tiny import tiny_model, tiny_tokenizer
from zopro.engine.feedback import Feedback
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.shared import Watch, hidden_shared

COPIES, PROMPT, COMPLETION = 3, 9, 5
WINDOW = 8  # of tiny Gemma's sliding layer


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, 300, (2, PROMPT), generator=generator).repeat_interleave(COPIES, 0)
    ids = torch.cat([prompts, torch.randint(3, 300, (2 * COPIES, COMPLETION), generator=generator)], 1)
    return ids, torch.ones_like(ids)


def convolutional() -> Any:
    """A tiny LFM2: attention between short convolutions, whose states a cache holds beside keys and values."""
    sizes = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "block_multiple_of": 8}
    kinds = ["conv", "full_attention", "conv"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, layer_types=kinds, initializer_range=0.2)).eval()


class Kept(Watch):
    cache: DynamicCache

    def prompts(self, cache: DynamicCache) -> None:
        self.cache = cache


@pytest.mark.parametrize("tail", [0, 2])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_keys_and_values_are_repeated_one_layer_at_a_time(kind: str, tail: int) -> None:
    model, (ids, mask), kept = tiny_model(kind, tiny_tokenizer()), batch(), Kept()
    parts = causal_parts(model)
    held: list[int] = []

    def count(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        held.append(sum(layer.keys.numel() for layer in kwargs["past_key_values"].layers if layer.is_initialized))

    hooks = [layer.register_forward_hook(count, with_kwargs=True) for layer in model.base_model.layers]
    with torch.no_grad():
        hidden_shared(parts, ids, mask, PROMPT, COPIES, kept, tail)
    for hook in hooks:
        hook.remove()
    heads = model.config.num_key_value_heads * model.config.head_dim
    columns = [min(PROMPT - tail, WINDOW - 1) if layer.is_sliding else PROMPT - tail for layer in kept.cache.layers]
    once = 2 * heads * sum(columns)
    assert held[-len(hooks) :] == [once] * len(hooks), "the prompts' alone, after every layer of the second pass"
    assert all(len(layer.keys) == 2 for layer in kept.cache.layers)


@torch.no_grad()
def test_states_of_convolutions_are_repeated_too() -> None:
    model, (ids, mask) = convolutional(), batch()
    plain = completion_logprobs(model, ids, mask, COMPLETION)
    shared = completion_logprobs(model, ids, mask, COMPLETION, num_generations=COPIES)
    assert torch.allclose(shared, plain, atol=1e-5)


@pytest.mark.parametrize("tail", [0, 3])
def test_blocks_with_states_are_run_again_from_the_same_states(tail: int) -> None:
    """Prompts in one local graph at a time, each sequence from their states as they were."""
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(convolutional().requires_grad_(False), config).eval()
    ids, mask = batch()
    weights = torch.linspace(-1, 1, 2 * COPIES)
    found = []
    for copies in (1, COPIES):
        feedback = Feedback(model, local="block", tail=tail)
        logprobs = feedback.logprobs(ids, mask, COMPLETION, num_generations=copies)
        found.append(feedback.gradients((logprobs.sum(1) * weights).sum()))
    for name, gradient in found[0].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max())), name
