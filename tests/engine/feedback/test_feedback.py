"""Residual feedback against autograd's gradient."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tiny import KINDS as FAMILIES
from trained import BLOCKS, COMPLETION, COPIES, LEVELS, PROMPT, batch, guess, loss_of, shared, trained
from zopro.engine.feedback import Feedback
from zopro.engine.feedback.stream import hooked, residual_stream
from zopro.engine.local.causal import Decoder, causal_parts
from zopro.engine.local.logprobs import completion_logprobs, completion_states
from zopro.errors import InputError
from zopro.weights.adapters import tensor_name
from zopro.zo.guided import LOCAL_ROWS


@cache
def true_gradient(kind: str) -> dict[str, torch.Tensor]:
    model, (ids, mask, _) = shared(kind), batch()
    named = {tensor_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss_of(completion_logprobs(model, ids, mask, COMPLETION)), list(named.values()))
    return dict(zip(named, found, strict=True))


@cache
def guess_and_truth(kind: str, **options: Any) -> tuple[Feedback, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The guess for a trained model of this kind, and its true gradient."""
    return *guess(shared(kind), **options), true_gradient(kind)


def cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    x, y = (torch.cat([tensor.double().flatten() for tensor in side]) for side in (a, b))
    return float(x @ y / (x.norm() * y.norm()))


@pytest.mark.parametrize("copies", [1, COPIES])
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_numbers_are_those_of_the_plain_log_probs(kind: str, copies: int) -> None:
    model, (ids, mask, _) = shared(kind), batch()
    found = Feedback(model).logprobs(
        ids, mask, COMPLETION, num_generations=copies, temperature=0.7, max_logit_elements=999
    )
    with torch.no_grad():
        assert torch.allclose(found, completion_logprobs(model, ids, mask, COMPLETION, temperature=0.7), atol=1e-4)


@pytest.mark.parametrize("local", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_cosine_with_the_gradient(kind: str, local: str) -> None:
    feedback, found, true = guess_and_truth(kind, local=local)
    total = cosine(list(found.values()), [true[name] for name in found])
    assert total > LEVELS[local][0]
    by_block: dict[int, list[str]] = {}
    for name in found:
        by_block.setdefault(feedback.block_of(name), []).append(name)
    cosines = [cosine([found[n] for n in names], [true[n] for n in names]) for _, names in sorted(by_block.items())]
    assert len(cosines) == BLOCKS and min(cosines) > LEVELS[local][1]
    assert local == "block" or cosines[-1] > cosines[0], "the guess is best where the stream ends"


@pytest.mark.parametrize("local", LEVELS)
@pytest.mark.parametrize("kind", FAMILIES)
def test_the_last_mlp_projection_s_gradient_is_exact(kind: str, local: str) -> None:
    """Nothing follows it but the final norm and, on Gemma, its own sandwich norm: both are taken back exactly."""
    _, found, true = guess_and_truth(kind, local=local)
    endings = ("down_proj.lora_B.weight", "mlp.c_proj.lora_B.weight", "4h_to_h.lora_B.weight")
    (name,) = [n for n in found if n.endswith(endings) and f".{BLOCKS - 1}." in n]
    assert torch.allclose(found[name], true[name], rtol=1e-3, atol=1e-5 * float(true[name].abs().max()))
    assert cosine([found[name]], [true[name]]) == pytest.approx(1, abs=1e-5)


def test_the_last_block_s_guess_is_exact_inside_too() -> None:
    for kind in FAMILIES:
        feedback, found, true = guess_and_truth(kind, local="mlp", top_blocks=1)
        assert len(feedback.blocks) == 1 and len(found) >= 5
        for name in found:
            assert cosine([found[name]], [true[name]]) == pytest.approx(1, abs=1e-5), name


@pytest.mark.parametrize(
    ("kind", "rows", "tail"),
    [
        *((kind, 1000, 0) for kind in FAMILIES),
        *((kind, 100, PROMPT) for kind in ("llama", "gemma3", "gpt2")),
        ("gemma3", 30, 0),
        ("gpt_neox", 100, 0),
        ("gpt2", 1000, PROMPT),
    ],
)
def test_with_all_of_the_prompts_swept_it_is_the_gradient(
    kind: str, rows: int, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sequences in one graph, some prompts', or one's; prompts swept for all answers, or with each."""
    monkeypatch.setitem(LOCAL_ROWS, "cpu", rows)
    monkeypatch.setattr("zopro.engine.feedback.blocks.PROMPTS_DTYPE", torch.float32)
    (_, found), true = guess(shared(kind), local="block", tail=tail), true_gradient(kind)
    assert found.keys() == true.keys()
    for name in found:
        assert torch.allclose(found[name], true[name], rtol=1e-3, atol=1e-5 * float(true[name].abs().max())), name


def held_gradient(model: Any, tail: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Autograd's, where each block reads constants at the prompts' tokens, but for the last `tail`."""
    (ids, mask, _), hidden = batch(), Decoder.hidden
    first_pass: list[bool] = []

    def marked(self: Decoder, ids: torch.Tensor, mask: Any, where: torch.Tensor, cache: Any) -> torch.Tensor:
        first_pass.append(cache.get_seq_length() == 0)
        return hidden(self, ids, mask, where, cache)

    def constant(module: Any, args: Any, kwargs: Any) -> Any:
        held = lambda x: x.detach() if first_pass[-1] else x  # noqa: E731
        if args:
            return (held(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": held(kwargs["hidden_states"])}

    blocks = [block.module for block in residual_stream(model).blocks]
    with hooked([block.register_forward_pre_hook(constant, with_kwargs=True) for block in blocks]):
        monkeypatch.setattr(Decoder, "hidden", marked)
        states = completion_states(causal_parts(model), ids, mask, COMPLETION, COPIES, tail=tail)
        monkeypatch.setattr(Decoder, "hidden", hidden)
    logits = causal_parts(model).logits(states.hidden)
    tokens = states.unpacked(logits.log_softmax(-1).gather(-1, states.targets[:, None])[:, 0])
    named = {tensor_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss_of(tokens), list(named.values())), strict=True))


@pytest.mark.parametrize(
    ("kind", "tail", "rows"), [("gemma3", 1, 1000), ("gemma3", 3, 100), ("gpt2", 1, 100), ("llama", 3, 1000)]
)
def test_what_blocks_read_of_the_prompts_is_held_constant(
    kind: str, tail: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what they make of it is not: keys and values of all prompts' tokens are part of the gradient."""
    monkeypatch.setitem(LOCAL_ROWS, "cpu", rows)
    model = shared(kind)
    expected = held_gradient(model, tail, monkeypatch)
    _, rounded = guess(model, local="block", tail=tail)
    monkeypatch.setattr("zopro.engine.feedback.blocks.PROMPTS_DTYPE", torch.float32)
    _, found = guess(model, local="block", tail=tail)
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.allclose(found[name], expected[name], rtol=1e-3, atol=1e-5 * float(expected[name].abs().max())), name
        assert cosine([rounded[name]], [expected[name]]) > 0.9999, name


def test_a_block_that_cannot_be_run_again_is_refused() -> None:
    model, (ids, mask, _) = trained("llama"), batch()
    loss = loss_of(Feedback(model, local="block").logprobs(ids, mask, COMPLETION, num_generations=COPIES))
    model.get_base_model().model.layers[2].mlp.register_forward_hook(lambda m, a, output: 1.5 * output)
    with pytest.raises(InputError, match=r"guide_local: block runs every block twice, and number 2 of this model"):
        loss.backward()


@pytest.mark.parametrize("local", ["chain", "block"])  # those that run something again, all that the others run too
def test_dropout_and_checkpointing_change_nothing(local: str) -> None:
    """A block that runs again for its products sees what the measured pass saw."""
    true = guess_and_truth("llama", local=local)[1]
    model = trained("llama").train()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda m, x: (torch.nn.functional.dropout(x[0], 0.5, m.training), *x[1:]))
    model.get_base_model().gradient_checkpointing_enable()
    found = guess(model, local=local)[1]
    assert all(torch.allclose(found[name], true[name], atol=1e-6) for name in true) and model.training


@pytest.mark.parametrize("local", ["chain", "block"])
def test_padding_and_shared_prompts_change_nothing(local: str) -> None:
    model, (ids, mask, _) = shared("gemma3"), batch()
    feedback = Feedback(model, local=local)
    together, alone = (
        feedback.gradients(loss_of(feedback.logprobs(ids, mask, COMPLETION, num_generations=copies)))
        for copies in (COPIES, 1)
    )
    for name in together:
        assert torch.allclose(together[name], alone[name], atol=1e-5 * float(alone[name].abs().max()) + 1e-7), name


def test_bfloat16_base_with_fp32_adapters() -> None:
    rounded = trained("llama")
    for parameter in rounded.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    for local in ("chain", "block"):
        _, a, _ = guess_and_truth("llama", local=local)
        _, b = guess(rounded, local=local)
        assert {tensor.dtype for tensor in b.values()} == {torch.float32}
        assert cosine(list(a.values()), list(b.values())) > 0.99
