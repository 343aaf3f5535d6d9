"""Completion log-probs against the dense computation from the model's own full logits: values, gradients, memory."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.local import causal
from zopro.engine.local.logprobs import completion_logprobs
from zopro.errors import InputError

COPIES, PROMPT, COMPLETION = 3, 9, 12


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def batch(seed=0):
    """Two prompts of 9 and 4 tokens, three completions each of unequal lengths, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(3, 300, (2, PROMPT), generator=generator).repeat_interleave(COPIES, 0)
    ids = torch.cat([prompts, torch.randint(3, 300, (2 * COPIES, COMPLETION), generator=generator)], 1)
    mask = torch.ones_like(ids)
    mask[COPIES:, : PROMPT - 4] = 0
    for row, length in enumerate((12, 3, 0, 7, 12, 1)):
        mask[row, PROMPT + length :] = 0
    return ids * mask, mask


def dense(model, ids, mask, temperature=1.0):
    """The same from [B, T, V] logits: log-probs and entropies (B, C), 0 on padding."""
    where = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=where, use_cache=False).logits
    log_p = (logits[:, PROMPT - 1 : -1].float() / temperature).log_softmax(-1)
    real = mask[:, PROMPT:]
    picked = log_p.gather(-1, ids[:, PROMPT:, None])[..., 0]
    return picked * real, -(log_p.exp() * log_p).sum(-1) * real


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copies", [1, COPIES])
def test_equal_the_dense_computation(kind, copies, tokenizer):
    model = tiny_model(kind, tokenizer, seed=1)
    ids, mask = batch()
    with torch.no_grad():
        for temperature in (1.0, 0.6):
            expected, entropies = dense(model, ids, mask, temperature)
            values, entropy = completion_logprobs(
                model,
                ids,
                mask,
                COMPLETION,
                temperature=temperature,
                max_logit_elements=5 * 300,
                return_entropy=True,
                num_generations=copies,
            )
            assert values.shape == entropy.shape == (6, COMPLETION)
            assert values.dtype == torch.float32
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(entropy, entropies, atol=1e-5, rtol=1e-5)
            assert (values[mask[:, PROMPT:] == 0] == 0).all()


def gradients(loss, parameters):
    return torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(("trained", "kind"), [*(("all", kind) for kind in KINDS), ("lora", "llama")])
@pytest.mark.parametrize("copies", [1, COPIES])
def test_gradients_equal_the_dense_computation(kind, copies, trained, tokenizer):
    model = tiny_model(kind, tokenizer, seed=1)
    if trained == "lora":
        model.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.1)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ids, mask = batch()
    weights = torch.randn((6, COMPLETION), generator=torch.Generator().manual_seed(1))
    expected = gradients((dense(model, ids, mask, 0.8)[0] * weights).sum(), parameters)
    values = completion_logprobs(
        model, ids, mask, COMPLETION, temperature=0.8, max_logit_elements=5 * 300, num_generations=copies
    )
    found = gradients((values * weights).sum(), parameters)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4 * float(theirs.abs().max()) + 1e-6, rtol=1e-3)


def test_gradient_by_finite_differences_in_double_precision(tokenizer):
    model = tiny_model("llama", tokenizer).double()
    ids, mask = batch()
    direction = torch.randn(
        model.model.layers[0].mlp.up_proj.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.double
    )
    weight = model.model.layers[0].mlp.up_proj.weight
    model.requires_grad_(False)
    weight.requires_grad_(True)

    def loss():
        return completion_logprobs(model, ids, mask, COMPLETION, num_generations=COPIES).sum()

    slope = float((torch.autograd.grad(loss(), weight)[0] * direction).sum())
    with torch.no_grad():
        weight += 1e-3 * direction
        up = float(loss())
        weight -= 2e-3 * direction
        down = float(loss())
    assert slope == pytest.approx((up - down) / 2e-3, rel=2e-3)


class Products(TorchDispatchMode):
    """Shapes of what is multiplied with a matrix or a part of it: (rows, its own rows)."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix, self.shapes = matrix.untyped_storage().data_ptr(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
            if tensors[-1].untyped_storage().data_ptr() == self.matrix:
                self.shapes.append(tuple(result.shape))
        return result


def test_never_more_logits_than_asked_for_and_none_for_prompts(tokenizer):
    model = tiny_model("llama", tokenizer, tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    ids, mask = batch()
    completion_logprobs(model, ids, mask, COMPLETION)  # whatever is done once for each model is not counted
    tokens, vocabulary, width = int(mask[:, PROMPT:].sum()), model.config.vocab_size, model.config.hidden_size
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, Products(model.lm_head.weight) as products:
            values = completion_logprobs(model, ids, mask, COMPLETION, max_logit_elements=4 * 300)
            logits = [shape for shape in products.shapes if shape[1] != width]
            before = len(products.shapes)
            if values.requires_grad:
                values.sum().backward()
            assert len(products.shapes) == before, "backward does not apply the output matrix again"
        assert max(rows * columns for rows, columns in logits) <= 4 * 300
        assert sum(rows * columns for rows, columns in logits) == tokens * vocabulary


def test_shared_prompts_pass_once(tokenizer):
    model = tiny_model("gemma3", tokenizer)
    ids, mask = batch()
    completion_logprobs(model, ids, mask, COMPLETION)
    tokens = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    with torch.no_grad():
        completion_logprobs(model, ids, mask, COMPLETION, num_generations=COPIES)
    assert tokens == [2 * PROMPT, 6 * (COMPLETION - 1)]
    hook.remove()


def test_a_compiled_model_is_looked_through(tokenizer):
    model, ids = tiny_model("llama", tokenizer), torch.arange(6).view(1, 6)
    found = completion_logprobs(torch.compile(model, backend="eager"), ids, torch.ones_like(ids), 2)
    assert torch.equal(found, completion_logprobs(model, ids, torch.ones_like(ids), 2))


def test_gradient_checkpointing_takes_the_plain_path(tokenizer):
    model = tiny_model("llama", tokenizer)
    model.gradient_checkpointing_enable()
    model.train()
    ids, mask = batch()
    values = completion_logprobs(model, ids, mask, COMPLETION, num_generations=COPIES)
    torch.testing.assert_close(values, dense(model, ids, mask)[0], atol=1e-5, rtol=1e-5)


def test_one_token_and_columns_of_padding(tokenizer):
    model = tiny_model("gpt2", tokenizer)
    ids, mask = batch()
    expected = dense(model, ids, mask)[0]
    wide_ids = torch.nn.functional.pad(ids, (5, 4))
    wide_mask = torch.nn.functional.pad(mask, (5, 4))
    with torch.no_grad():
        wide = completion_logprobs(model, wide_ids, wide_mask, COMPLETION + 4, num_generations=COPIES)
        one = completion_logprobs(model, ids[:, : PROMPT + 1], mask[:, : PROMPT + 1], 1, num_generations=COPIES)
    torch.testing.assert_close(wide[:, :COMPLETION], expected, atol=1e-5, rtol=1e-5)
    assert (wide[:, COMPLETION:] == 0).all()
    torch.testing.assert_close(one, expected[:, :1], atol=1e-5, rtol=1e-5)


def test_bad_shapes_are_refused(tokenizer):
    model = tiny_model("llama", tokenizer)
    ids, mask = batch()
    for length in (0, PROMPT + COMPLETION):
        with pytest.raises(ValueError, match="completion_length"):
            completion_logprobs(model, ids, mask, length)
    with pytest.raises(ValueError, match="must divide the 6 rows, got 4"):
        completion_logprobs(model, ids, mask, COMPLETION, num_generations=4)
    with pytest.raises(ValueError, match="each 6 consecutive rows must have the same prompt"):
        completion_logprobs(model, ids, mask, COMPLETION, num_generations=6)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def scaled_models():
    with torch.random.fork_rng(devices=[]):
        yield CohereForCausalLM(CohereConfig(**SMALL, logit_scale=3.0)).eval()
        capped = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.5, query_pre_attn_scalar=8)
        yield Gemma2ForCausalLM(capped).eval()


def test_scaled_and_capped_logits():
    ids, mask = batch()
    for model in scaled_models():
        with torch.no_grad():
            values = completion_logprobs(model, ids, mask, COMPLETION)
            torch.testing.assert_close(values, dense(model, ids, mask)[0], atol=1e-5, rtol=1e-5)


def test_an_unknown_treatment_of_logits_is_refused(tokenizer, monkeypatch):
    model = next(iter(scaled_models()))
    monkeypatch.setattr(causal, "_logit_scale", lambda config: 1.0)
    with pytest.raises(InputError, match="CohereForCausalLM changes its logits"):
        completion_logprobs(model, *batch(), COMPLETION)
