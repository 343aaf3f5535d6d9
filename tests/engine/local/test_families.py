"""Every causal family of transformers, tiny: each number right against transformers' own plain passes, or refused.

A row of FAMILIES says how a family runs, which docs/models.md tells users; a row that changes is a change to tell.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from families import ANSWERS, COPIES, PROMPTS, ROWS, VARIANTS, batch, family, family_model, named
from tiny import tiny_tokenizer
from zopro.engine.feedback import Feedback
from zopro.engine.local.abilities import NEVER, Abilities, abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.models import sequence_classifier
from zopro.engine.local.rollouts import generate
from zopro.errors import InputError
from zopro.rewards import RewardModel
from zopro.zo.guided import LOCAL_ROWS

SHARED = Abilities()
LATER = Abilities(gradients_from=2)  # but not back through a prompt's states to a single token
VALUES = Abilities(gradients_from=NEVER)  # prompts are shared without back-propagation
OWN = Abilities(shares=False, gradients_from=NEVER)  # each answer has its own prompt, decoding has a cache
NONE = Abilities(decodes=False, shares=False, gradients_from=NEVER)
APART = Abilities(pads=False, decodes=False, shares=False, gradients_from=NEVER)

# name -> how it runs, and how the guided sweep does: shared, alone (a prompt for each answer) or refused
FAMILIES: dict[str, tuple[Abilities, str]] = {
    **dict.fromkeys(
        [
            "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neo",
            "gpt_neox", "gptj", "gpt_bigcode", "gpt_oss", "bloom", "falcon", "falcon_alibi", "phi", "phi3", "mpt",
            "stablelm", "starcoder2", "olmo", "olmo2", "olmoe", "granite", "granitemoe", "cohere", "cohere2", "mixtral",
            "deepseek_v2", "deepseek_v3", "glm4", "glm4_moe_lite", "exaone4", "smollm3", "nemotron", "ernie4_5",
            "minicpm3", "persimmon", "xglm", "biogpt", "nanochat",
        ],
        (SHARED, "shared"),
    ),
    "opt": (SHARED, "refused"),
    "granitemoehybrid": (LATER, "refused"),
    "lfm2": (SHARED, "alone"),
    "lfm2_moe": (SHARED, "alone"),
    "bamba": (LATER, "alone"),
    "falcon_h1": (LATER, "refused"),
    "mamba2": (LATER, "alone"),
    "nemotron_h": (LATER, "alone"),
    "qwen3_next": (VALUES, "alone"),
    "qwen3_5_text": (VALUES, "alone"),
    "olmo_hybrid": (VALUES, "alone"),
    "jamba": (OWN, "alone"),
    "mamba": (OWN, "alone"),
    "falcon_mamba": (OWN, "alone"),
    "zamba2": (LATER, "alone"),
    "zamba": (OWN, "alone"),
    "minimax": (NONE, "refused"),
    "recurrent_gemma": (NONE, "alone"),
    "rwkv": (APART, "refused"),
    "xlstm": (APART, "alone"),
}  # fmt: skip
REFUSED = {"cpmant": "reads tokens that come later", "modernbert-decoder": "changes its logits in a way"}
# Of log-probs, in nats, where passes of different lengths round differently.
TOLERANCE = {"qwen3_next": 1e-3}

NEW = 4  # tokens sampled
WEIGHTS = torch.tensor([1.0, -0.5, 0.7, -1.2])


def their_logprobs(model: Any) -> list[torch.Tensor]:
    """Of each row alone, by transformers' own forward pass without a cache."""
    found = []
    for row, answer in zip(ROWS, ANSWERS, strict=True):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -len(answer) - 1 : -1]
        found.append(logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0])
    return found


def close(found: torch.Tensor, expected: list[torch.Tensor], tolerance: float) -> None:
    for ours, theirs in zip(found.detach(), expected, strict=True):
        torch.testing.assert_close(ours[: len(theirs)], theirs, atol=tolerance, rtol=0)
        assert (ours[len(theirs) :] == 0).all()


def flat(gradients: Any) -> torch.Tensor:
    return torch.cat([gradient.double().flatten() for gradient in gradients])


@cache
def truth(name: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probs of the rows, and the gradient of their weighted sum."""
    rows, parameters = their_logprobs(family(name)), named(family(name))
    loss = (torch.stack([row.sum() for row in rows]) * WEIGHTS).sum()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    gradients = {name: torch.zeros_like(p) if gradient is None else gradient for (name, p), gradient in pairs}
    return [row.detach() for row in rows], gradients


@pytest.mark.parametrize("name", FAMILIES)
def test_log_probs_tokens_and_gradients_are_transformers_own(name: str) -> None:
    model, (ids, mask, length) = family(name), batch()
    assert abilities(causal_parts(model)) == FAMILIES[name][0]
    (expected, true), tolerance = truth(name), TOLERANCE.get(name, 1e-4)
    found = completion_logprobs(model, ids, mask, length, num_generations=COPIES)
    close(found, expected, tolerance)
    ours = torch.autograd.grad((found.sum(1) * WEIGHTS).sum(), list(named(model).values()), allow_unused=True)
    ours = [torch.zeros_like(g) if o is None else o for o, g in zip(ours, true.values(), strict=True)]
    assert (flat(ours) - flat(true.values())).norm() < 5e-3 * flat(true.values()).norm()
    drawn = generate(
        model, PROMPTS, num_generations=COPIES, max_new_tokens=NEW, eos_token_ids=[-1], pad_token_id=0, do_sample=False
    )
    with torch.no_grad():
        for copies in (1, COPIES):
            close(completion_logprobs(model, ids, mask, length, num_generations=copies), expected, tolerance)
        for i, prompt in enumerate(PROMPTS):
            rows = slice(i * COPIES, (i + 1) * COPIES)
            answer = drawn.completion_ids[rows.start].tolist()
            logits = model(input_ids=torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
            assert drawn.completion_ids[rows].tolist() == [logits.argmax(-1).tolist()] * COPIES, "the greedy answer"
            close(drawn.logprobs[rows], [logits.log_softmax(-1).amax(-1)] * COPIES, 1e-3)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_guided_sweep_is_the_gradient_or_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt and its answers at a time, as in batches that are too large for one graph."""
    monkeypatch.setitem(LOCAL_ROWS, "cpu", 1)
    model, (ids, mask, length), how = family(name), batch(), FAMILIES[name][1]
    if how == "refused":
        with pytest.raises(InputError, match=type(model.get_base_model()).__name__):
            Feedback(model, local="block", tail=0)
        return
    feedback = Feedback(model, local="block", tail=0)
    assert feedback.alone == (how == "alone")
    values = feedback.logprobs(ids, mask, length, num_generations=COPIES)
    found = feedback.gradients((values.sum(1) * WEIGHTS).sum())
    _, true = truth(name)
    ours, theirs = (flat(side[name] for name in found) for side in (found, true))
    assert float(ours @ theirs / (ours.norm() * theirs.norm())) > 0.99
    assert found.keys() == true.keys()


CLASSIFIERS = [name for name in FAMILIES if VARIANTS.get(name, name) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES]


TRIED = {FAMILIES[name][0]: name for name in CLASSIFIERS}.values()
"""Of each way to run one: trying a model again as a classifier takes longer than all the rest."""


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_rewards_are_the_classifier_s_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = getattr(transformers, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[VARIANTS.get(name, name)])
    if issubclass(head, GenericForSequenceClassification) and name not in ("llama", *TRIED):
        return  # llama's head on states that the log-probs are of
    if name not in TRIED:
        monkeypatch.setattr("zopro.engine.local.abilities._try", lambda parts, backward: FAMILIES[name][0])
    tokenizer = tiny_tokenizer()
    classifier = sequence_classifier(family_model(name), tokenizer, seed=0)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear", modules_to_save=["score"])
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(classifier, config)
    rewards = RewardModel(model, tokenizer, 64)
    prompts = [PROMPTS[i // COPIES] for i in range(len(ANSWERS))]
    with torch.no_grad():
        rows = [torch.tensor([[*row, tokenizer.eos_token_id]]) for row in ROWS]
        expected = [float(model(input_ids=row, use_cache=False).logits[0, 0]) for row in rows]
    assert rewards.score(prompts, ANSWERS) == pytest.approx(expected, abs=1e-4)  # a prompt in a row, as in training
    assert rewards.score(prompts[1:], ANSWERS[1:]) == pytest.approx(expected[1:], abs=1e-4)


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_plain_pass_matches_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=REFUSED[name]):
        abilities(causal_parts(family_model(name)))
