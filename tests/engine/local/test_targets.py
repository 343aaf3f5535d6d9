"""Which modules carry adapters: the same as in PEFT, and the engine's numbers over them are transformers' own."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from one_run import no_report
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import config, write_inputs
from zopro.config.model import ModelOptions
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.rollouts import generate
from zopro.engine.local.targets import check_targets, new_adapter
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.replay import replay

TOKENIZER = tiny_tokenizer()
GIVEN: dict[str, Any] = {
    "q_proj": ["q_proj"],
    "q_proj, up_proj,": ["q_proj", "up_proj"],
    "layers.0.mlp.up_proj": ["layers.0.mlp.up_proj"],
    r".*\.layers\.1\..*(q|v)_proj": r".*\.layers\.1\..*(q|v)_proj",
    ".*embed_tokens": ".*embed_tokens",
    "embed_tokens,o_proj": ["embed_tokens", "o_proj"],
}


def options(targets: str, **more: Any) -> ModelOptions:
    return ModelOptions(model="x", lora_r=2, lora_target_modules=targets, **more)


def adapted(targets: str) -> Any:
    base = tiny_model("llama", TOKENIZER)
    check_targets(base, options(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_adapter(base, options(targets), "CAUSAL_LM")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    return model.eval()


@pytest.mark.parametrize("targets", GIVEN)
def test_targets_mean_what_they_mean_in_peft(targets):
    config = LoraConfig(r=2, target_modules=GIVEN[targets], task_type="CAUSAL_LM")
    expected = get_peft_model(tiny_model("llama", TOKENIZER), config)
    model = adapted(targets)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in expected.named_parameters()]


@torch.no_grad()
@pytest.mark.parametrize("targets", [".*embed_tokens", "embed_tokens,o_proj"])
def test_adapters_on_embeddings_reach_every_log_probability(targets):
    model = adapted(targets)
    prompts = [[1, 40, 41], [1, 50, 51]]
    drawn = generate(
        model, prompts, num_generations=2, max_new_tokens=4, eos_token_ids=[2], pad_token_id=0, temperature=1.0,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    ids = torch.cat([drawn.prompt_ids, drawn.completion_ids], 1)
    mask = torch.cat([drawn.prompt_mask, drawn.completion_mask], 1)
    whole = model(input_ids=ids, attention_mask=mask).logits[:, 2:-1].log_softmax(-1)
    expected = whole.gather(2, drawn.completion_ids[:, :, None])[:, :, 0]
    seen = drawn.completion_mask.bool()
    recomputed = completion_logprobs(model, ids, mask, 4, temperature=1.0)
    torch.testing.assert_close(drawn.logprobs[seen], expected[seen], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(recomputed[seen], expected[seen], atol=1e-4, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(completion_logprobs(model, ids, mask, 4)[seen], expected[seen], atol=1e-2)


def test_embeddings_that_are_the_head_too_are_refused():
    """PEFT adapts the embedding alone; merged into one matrix the adapter would change the head as well."""
    tied = tiny_model("llama", TOKENIZER, tie_word_embeddings=True)
    with pytest.raises(InputError, match="share their weights with the output head"):
        check_targets(tied, options("q_proj,embed_tokens"))
    check_targets(tied, options("q_proj"))
    check_targets(tied, options("all-linear"))


def test_a_refusal_names_what_there_is():
    for kind, names in (("llama", "embed_tokens, q_proj, k_proj"), ("gpt2", "wte, wpe, c_attn, c_proj, c_fc")):
        with pytest.raises(InputError, match=re.escape(f"There are: {names}")) as refused:
            check_targets(tiny_model(kind, TOKENIZER), options("nope"))
        assert "lm_head" not in str(refused.value) and "\n" not in str(refused.value)


def test_the_loop_trains_embeddings_and_replays_them(tmp_path, monkeypatch):
    """Adapters of embeddings have names of their own in PEFT; TRL's copy of the policy, the reference, must not move."""
    no_report(monkeypatch)
    run = tmp_path / "run"
    targets = {"lora_target_modules": "q_proj,embed_tokens", "method": "mezo", "warm_start": "spsa"}
    settings = config(write_inputs(tmp_path / "inputs"), run, iterations=2, policy_steps=2, **targets)
    pipeline.run(settings, quiet=True)
    states = [load_file(run / folder / "adapter_model.safetensors") for folder in ("sft", "policy/000", "policy/001")]
    for before, after in pairwise(states):
        assert all(not torch.equal(before[name], after[name]) for name in before)
    assert any("lora_embedding_B" in name for name in states[0])
    assert replay(run, tmp_path / "replayed")["equal"]
