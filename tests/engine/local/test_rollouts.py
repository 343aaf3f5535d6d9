"""Rollouts against `transformers.generate` (greedy) and against the exact distribution (sampling)."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.rollouts import generate

PROMPTS = [[1, 40, 41], [1, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140], [1, 7], [1, 9, 200, 201, 9, 200, 201]]
STOP = {"eos_token_ids": [2], "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return ids, mask


def theirs(model, prompts, **options):
    """Completions of transformers' own generate, cut after EOS."""
    ids, mask = left_padded(prompts)
    out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **options)
    return [cut(row, options["eos_token_id"]) for row in out[:, ids.shape[1] :].tolist()]


def cut(row, stops):
    ends = [i for i, token in enumerate(row) if token in stops]
    return row[: ends[0] + 1] if ends else row


def ours(rollouts):
    lengths = rollouts.completion_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(rollouts.completion_ids.tolist(), lengths, strict=True)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def perturbed_adapter(model):
    """LoRA whose B matrices are not zero, so that it changes the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_equals_transformers_generate(kind, tokenizer):
    model = tiny_model(kind, tokenizer, seed=1)
    first = ours(generate(model, PROMPTS, max_new_tokens=20, eos_token_ids=[-1], pad_token_id=0, do_sample=False))
    assert first == theirs(model, PROMPTS, max_new_tokens=20, eos_token_id=[-1])
    stops = [first[0][4], first[1][9], first[2][15]]  # rows end at different steps, which compacts the batch
    stopped = generate(model, PROMPTS, max_new_tokens=20, eos_token_ids=stops, pad_token_id=0, do_sample=False)
    assert ours(stopped) == theirs(model, PROMPTS, max_new_tokens=20, eos_token_id=stops)
    assert len({len(row) for row in ours(stopped)}) > 1


@pytest.mark.parametrize("kind", ["gemma3", "gpt2"])
def test_greedy_equals_generate_with_an_adapter(kind, tokenizer):
    plain = tiny_model(kind, tokenizer, seed=1)
    before = ours(generate(plain, PROMPTS, max_new_tokens=12, do_sample=False, **STOP))
    model = perturbed_adapter(plain)
    after = ours(generate(model, PROMPTS, max_new_tokens=12, do_sample=False, **STOP))
    assert after == theirs(model, PROMPTS, max_new_tokens=12, eos_token_id=[2])
    assert after != before
    with model.disable_adapter():
        assert ours(generate(model, PROMPTS, max_new_tokens=12, do_sample=False, **STOP)) == before


TRUNCATED = {"temperature": 1.3, "top_k": 5, "top_p": 0.8}


@pytest.mark.parametrize(
    ("kind", "options"), [*((kind, TRUNCATED) for kind in KINDS), ("llama", {}), ("llama", {"temperature": 0.7})]
)
def test_logprobs_are_those_of_the_untruncated_distribution(kind, options, tokenizer):
    model = tiny_model(kind, tokenizer, seed=2)
    drawn = generate(model, PROMPTS, num_generations=3, max_new_tokens=12, generator=seeded(), **STOP, **options)
    ids = torch.cat([drawn.prompt_ids, drawn.completion_ids], 1)
    mask = torch.cat([drawn.prompt_mask, drawn.completion_mask], 1)
    with torch.no_grad():
        again = completion_logprobs(
            model, ids, mask, drawn.completion_ids.shape[1], temperature=options.get("temperature", 1.0)
        )
    torch.testing.assert_close(drawn.logprobs, again, atol=2e-5, rtol=1e-5)


def test_layout_of_rollouts(tokenizer):
    model = tiny_model("llama", tokenizer)
    stops = list(range(0, 300, 3))  # a third of the vocabulary: rows end early, at different steps
    drawn = generate(
        model, PROMPTS, num_generations=4, max_new_tokens=16, eos_token_ids=stops, pad_token_id=299, generator=seeded()
    )
    width = max(map(len, PROMPTS))
    assert drawn.prompt_ids.shape == drawn.prompt_mask.shape == (16, width)
    for row in range(16):
        prompt = PROMPTS[row // 4]
        assert drawn.prompt_ids[row].tolist() == [299] * (width - len(prompt)) + prompt
        assert drawn.prompt_mask[row].tolist() == [0] * (width - len(prompt)) + [1] * len(prompt)
        length = int(drawn.completion_mask[row].sum())
        tokens = drawn.completion_ids[row].tolist()
        assert drawn.completion_mask[row].tolist() == [1] * length + [0] * (len(tokens) - length)
        assert all(token not in stops for token in tokens[: length - 1])
        assert tokens[length - 1] in stops or length == 16
        assert set(tokens[length:]) <= {299}
        assert drawn.logprobs[row, length:].abs().sum() == 0
        assert (drawn.logprobs[row, :length] < 0).all()
    assert drawn.completion_mask.sum(1).max() == drawn.completion_ids.shape[1]


def test_batching_does_not_change_what_a_row_samples(tokenizer):
    model = tiny_model("gemma3", tokenizer)
    options = {"num_generations": 3, "max_new_tokens": 10, "eos_token_ids": range(0, 300, 7), "pad_token_id": 0}
    together = generate(model, PROMPTS, generator=seeded(), **options)
    apart = generate(model, PROMPTS, generator=seeded(), max_batch_tokens=1, **options)
    assert ours(together) == ours(apart)
    assert ours(generate(model, PROMPTS, generator=seeded(1), **options)) != ours(together)
    torch.testing.assert_close(together.logprobs, apart.logprobs, atol=1e-5, rtol=1e-5)


def test_with_a_generator_of_its_own_a_row_does_not_depend_on_the_rows_beside_it(tokenizer):
    model = tiny_model("gemma3", tokenizer)
    options = {"num_generations": 2, "max_new_tokens": 10, "eos_token_ids": range(0, 300, 7), "pad_token_id": 0}
    together = ours(generate(model, PROMPTS, generator=[seeded(row) for row in range(2 * len(PROMPTS))], **options))
    second = ours(generate(model, PROMPTS[1:2], generator=[seeded(2), seeded(3)], **options))
    assert second == together[2:4] and together[2] != together[3]


def test_batches_keep_to_the_token_budget_and_finished_rows_leave(tokenizer):
    model = tiny_model("llama", tokenizer)
    generate(model, PROMPTS, max_new_tokens=1, **STOP)  # whatever is done once for each model is not counted
    sizes = []
    hook = model.base_model.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(tuple(output.last_hidden_state.shape[:2])), with_kwargs=True
    )
    options = {"num_generations": 2, "max_new_tokens": 10, "pad_token_id": 0, "generator": seeded()}
    generate(model, PROMPTS, eos_token_ids=[-1], max_batch_tokens=80, **options)
    prefills = [(rows, tokens) for rows, tokens in sizes if tokens > 1]
    assert len(prefills) > 1
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)  # each once, not once for each of its completions
    assert all(2 * rows * (tokens + 10) <= 80 or rows == 1 for rows, tokens in prefills)
    sizes.clear()
    generate(model, PROMPTS, eos_token_ids=range(0, 300, 3), **options)
    decoded = [rows for rows, tokens in sizes if tokens == 1]
    assert decoded == sorted(decoded, reverse=True)
    assert decoded[-1] <= decoded[0] / 2
    hook.remove()


def test_the_model_keeps_its_mode_and_the_global_random_state_is_left_alone(tokenizer):
    model = tiny_model("gpt2", tokenizer, attn_pdrop=0.5, resid_pdrop=0.5)
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    one = generate(model, PROMPTS, max_new_tokens=6, generator=seeded(), **STOP)
    two = generate(model, PROMPTS, max_new_tokens=6, generator=seeded(), **STOP)
    assert torch.equal(one.completion_ids, two.completion_ids)  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not one.logprobs.requires_grad


def chi_square(counts, probabilities):
    """The statistic and its 99.9 % quantile (Wilson-Hilferty), cells with fewer than 8 expected draws pooled."""
    expected = probabilities * counts.sum()
    small = expected < 8
    observed = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    kept = expected > 0
    assert observed[~kept].sum() == 0
    freedom = int(kept.sum()) - 1
    quantile = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    return float(((observed - expected)[kept] ** 2 / expected[kept]).sum()), quantile


def truncated(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=None):
    """The distribution that transformers' own logits processors leave."""
    from transformers import generation as g

    scores = logits[None] / temperature
    processors = [top_k and g.TopKLogitsWarper(top_k), top_p < 1 and g.TopPLogitsWarper(top_p)]
    for processor in [*processors, min_p and g.MinPLogitsWarper(min_p)]:
        scores = processor(None, scores) if processor else scores
    return scores.softmax(-1)[0].double()


LARGE = {"vocab_size": 1100, "tie_word_embeddings": False}  # several blocks, and more than the first candidates


@pytest.mark.parametrize(
    ("options", "vocabulary", "draws"),
    [
        ({}, {}, 20000),
        ({"temperature": 0.5}, LARGE, 8000),
        ({"top_k": 12}, {}, 8000),
        ({"top_p": 0.7}, LARGE, 8000),
        ({"min_p": 0.2}, {}, 8000),
        ({"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.05}, {}, 8000),
    ],
    ids=str,
)
def test_sampling_distribution(options, vocabulary, draws, tokenizer):
    model = tiny_model("llama", tokenizer, seed=3, **vocabulary)
    drawn = generate(
        model, [[1, 40, 41]], num_generations=draws, max_new_tokens=1, generator=seeded(7), **STOP, **options
    )
    with torch.no_grad():
        logits = model(torch.tensor([[1, 40, 41]])).logits[0, -1]
    counts = torch.bincount(drawn.completion_ids[:, 0], minlength=len(logits)).double()
    probabilities = truncated(logits, **options)
    assert (probabilities == 0).any() or set(options) <= {"temperature"}
    statistic, quantile = chi_square(counts, probabilities)
    assert statistic < quantile
    wrong, limit = chi_square(counts, truncated(logits, temperature=1.2 * options.get("temperature", 1.0)))
    assert wrong > limit  # the test can fail
