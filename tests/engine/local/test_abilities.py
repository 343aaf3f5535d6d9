"""The trial of a model: what it finds where little is to be seen, what it costs, and who asks it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import RLOOConfig

from families import batch, family, family_model, named
from tiny import tiny_model, tiny_tokenizer
from tiny_trainers import online, same, weights, word_tokenizer
from zopro.config.model import ModelOptions
from zopro.engine.feedback import Feedback
from zopro.engine.local import abilities as module
from zopro.engine.local.abilities import NEVER, Abilities, abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.models import lora_config
from zopro.errors import InputError
from zopro.train.rloo import EngineRLOOTrainer
from zopro.zo.perturbation import InPlace
from zopro.zo.together import Together


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lost_state_is_found_where_the_output_hardly_shows_it(dtype: torch.dtype) -> None:
    """Weights of the usual initial width: what Jamba's answers lose of their prompt is 2e-5 of what it gives."""
    found = abilities(causal_parts(family_model("jamba", initializer_range=0.02).to(dtype)))
    assert found == Abilities(shares=False, gradients_from=NEVER)


@pytest.mark.parametrize("name", ["lfm2", "qwen3_next"])
def test_states_are_swept_where_the_gradient_hardly_shows_them(name: str) -> None:
    model = family_model(name, initializer_range=0.02).requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert Feedback(adapted, local="block").alone


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_rounding_is_not_taken_for_a_fault(kind: str) -> None:
    for width in (0.02, 0.3):
        model = tiny_model(kind, tiny_tokenizer(), initializer_range=width).bfloat16()
        assert abilities(causal_parts(model)) == Abilities()


def test_the_trial_is_short_and_made_once() -> None:
    model, tokens = tiny_model("llama", tiny_tokenizer()), []
    model.get_input_embeddings().register_forward_hook(lambda m, args, output: tokens.append(args[0].numel()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    abilities(causal_parts(model))
    assert len(tokens) < 20 and sum(tokens) < 200
    tokens.clear()
    abilities(causal_parts(model))
    assert not tokens
    assert model.training and all(module.training for module in model.modules())
    assert same(before, model.state_dict()) and all(p.grad is None for p in model.parameters())


def test_what_it_costs_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "_said", set())
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        for _ in range(2):
            assert not abilities(causal_parts(family_model("minimax"))).decodes
        abilities(causal_parts(family_model("llama")))
    assert [record.message for record in caplog.records] == [
        "model: minimax cannot go on from its cache in every way, so each new token reads the whole text again, "
        "a prompt runs once for each of its answers"
    ]


def test_a_broken_architecture_is_one_line() -> None:
    model = family_model("llama")
    model.model.layers[0].mlp.register_forward_pre_hook(lambda m, args: args[0][:, ::-1])
    with pytest.raises(InputError, match=r"model: LlamaForCausalLM does not run as a causal language model here"):
        causal_parts(model)


@pytest.mark.parametrize("name", ["jamba", "qwen3_5_text", "rwkv"])
def test_both_sides_in_one_pass(name: str) -> None:
    """With shared prompts, with each answer's own, and with rows of each length apart."""
    model, (ids, mask, length) = family(name), batch()
    parameters = list(named(model).values())
    noise = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.05 for i, p in enumerate(parameters)]
    together, sides = Together(parameters), (1, -1)
    abilities(causal_parts(model))

    def logprobs(times: int) -> torch.Tensor:
        return completion_logprobs(model, torch.cat([ids] * times), torch.cat([mask] * times), length, num_generations=2)

    with torch.no_grad():
        for side in sides:
            with InPlace(parameters).at(lambda index, side=side: side * noise[index]):
                expected = logprobs(1)
            with together.at(lambda index, side=side: side * noise[index]):
                torch.testing.assert_close(together.rows(lambda: logprobs(2)), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["qwen3_5_text", "olmo_hybrid"])
def test_back_propagation_trains_hybrids(name: str, tmp_path: Path) -> None:
    model: Any = family_model(name, vocab_size=len(word_tokenizer()), pad_token_id=None)
    trainer = online(EngineRLOOTrainer, RLOOConfig, tmp_path, {"model": model, "learning_rate": 0.1, "max_steps": 1})
    before = weights(trainer.model)
    trainer.train()
    assert not same(before, weights(trainer.model))


def test_all_linear_leaves_out_what_peft_refuses() -> None:
    options = ModelOptions(model="x", lora_r=2)
    assert lora_config(options, "CAUSAL_LM", family_model("mamba")).exclude_modules == {"out_proj"}
    assert lora_config(options, "CAUSAL_LM", family_model("opt")).exclude_modules is None
