"""Feedback in use: what a pass keeps, which gradients it fills, steps along it, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tiny import tiny_model, tiny_tokenizer
from trained import BLOCKS, COMPLETION, LEVELS, PROMPT, batch, guess, loss_of, shared, trained
from zopro.engine.feedback import Feedback
from zopro.engine.local.logprobs import completion_logprobs
from zopro.errors import InputError
from zopro.weights.adapters import tensor_name
from zopro.zo import SPSA
from zopro.zo.guided import ResidualFeedback


@pytest.mark.parametrize("local", LEVELS)
def test_backward_fills_the_gradients_of_guided_adapters_only(local: str) -> None:
    model, (ids, mask, _) = shared("llama"), batch()
    model.zero_grad()
    feedback = Feedback(model, local=local)
    loss_of(feedback.logprobs(ids, mask, COMPLETION)).backward()
    _, expected = guess(model, local=local)
    for name, parameter in model.named_parameters():
        if tensor_name(name) in expected:
            assert torch.allclose(parameter.grad, expected[tensor_name(name)], atol=1e-6)
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize(("local", "tail"), [*((local, 4) for local in LEVELS), ("block", 0)])
def test_no_graph_and_few_elements_kept(local: str, tail: int) -> None:
    """Rank-r activations, and one width-H row a token for the final norm, the error and (chain) each MLP.

    Blocks: what each reads of completions and prompts, and keys and values of the prompts but for the tail.
    """
    model, (ids, mask, _) = shared("llama"), batch()
    feedback = Feedback(model, local=local, tail=tail)
    seen: list[bool] = []

    class Watched(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(torch.is_grad_enabled())
            return func(*args, **(kwargs or {}))

    with Watched():
        result = feedback.logprobs(ids, mask, COMPLETION)
    assert len(seen) > 100 and not any(seen), "every operation of the pass, the output matrix's too"
    assert [type(edge[0]).__name__ for edge in result.grad_fn.next_functions if edge[0] is not None] == (
        ["AccumulateGrad"] * len(feedback.parameters)
    )
    tokens, width, rank = int(mask[:, -COMPLETION:].sum()), 32, 4
    rows = 2 * width + BLOCKS * (2 * rank if local == "none" else rank + width)
    if local == "block":
        swept, cached = 16 * (COMPLETION + tail - 1), 16 * (PROMPT - tail)
        read = (BLOCKS + 1) * cached * width  # at the rest of the prompts' tokens
        heads = model.config.num_key_value_heads * model.config.hidden_size // model.config.num_attention_heads
        expected = tokens * width + (BLOCKS + 1) * swept * width + BLOCKS * 2 * cached * heads + read
    else:
        expected = tokens * rows
    assert feedback.elements_kept == expected
    assert not any(module._forward_hooks for module in model.modules()), "hooks stay on during passes only"


@pytest.mark.parametrize(("local", "sides"), [("none", 1), ("mlp", 2), ("chain", 1), ("block", 2)])
def test_spsa_along_it_descends(local: str, sides: int) -> None:
    model, (ids, mask, _) = trained("llama"), batch()
    feedback = Feedback(model, local=local)
    named = [(tensor_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    directions = ResidualFeedback()
    options: dict[str, Any] = {"eps": 1e-3, "directions": directions, "sides": sides, "second_moment_beta": 0.9}
    optimizer = SPSA(named, lr=2e-3, **options)

    def closure() -> torch.Tensor:
        return loss_of(completion_logprobs(model, ids, mask, COMPLETION))

    with torch.no_grad():
        before = float(closure())
    for step in range(4):
        found = feedback.gradients(loss_of(feedback.logprobs(ids, mask, COMPLETION)))
        directions.update(found, step)
        with torch.no_grad():
            optimizer.step(closure)
        assert optimizer.last.projected_gradient > 0, "the guess must go uphill, so that the step goes downhill"
    with torch.no_grad():
        assert float(closure()) < before - 0.1


def test_a_direction_to_avoid_is_taken_off_tensor_by_tensor() -> None:
    model = shared("llama")
    _, plain = guess(model, local="chain")
    generator = torch.Generator().manual_seed(0)
    avoid = {name: torch.randn(g.shape, generator=generator) + g / g.norm() for name, g in plain.items()}
    parallel, still, missing = list(avoid)[:3]
    avoid[parallel], avoid[still] = 7 * plain[parallel], torch.zeros_like(plain[still])
    del avoid[missing]
    _, found = guess(model, local="chain", avoid={**avoid, "head.weight": torch.ones(3)})
    for name, gradient in plain.items():
        if name in (still, missing):
            assert torch.equal(found[name], gradient), name
        elif name == parallel:
            assert found[name].norm() < 1e-6 * gradient.norm()
        else:
            unit = avoid[name] / avoid[name].norm()
            assert torch.allclose(found[name], gradient - (unit * gradient).sum() * unit, atol=1e-6)
            assert abs(float((found[name] * unit).sum())) < 1e-6 * float(gradient.norm())


def test_adapters_that_do_not_write_to_the_stream_are_refused() -> None:
    with pytest.raises(InputError, match=r"lora_target_modules: must name layers .*\(down_proj, o_proj\)"):
        Feedback(trained("llama", ["q_proj", "v_proj"]))
    with pytest.raises(InputError, match="lora_target_modules"):
        Feedback(tiny_model("llama", tiny_tokenizer()))


def test_arguments_out_of_range() -> None:
    model = shared("llama")
    with pytest.raises(ValueError, match=r"local: must be one of none, mlp, chain, block, got 'all'"):
        Feedback(model, local="all")
    with pytest.raises(ValueError, match=r"top_blocks: must not be negative, got -1"):
        Feedback(model, top_blocks=-1)
    with pytest.raises(ValueError, match=r"tail: must not be negative, got -1"):
        Feedback(model, tail=-1)
