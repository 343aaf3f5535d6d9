"""Models in float16: log-probs in float32, differences that survive it, one line where numbers leave its range."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from one_run import no_report
from tiny import KINDS, tiny_model, tiny_tokenizer
from tiny_runs import config, write_inputs
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.models import resolve_dtype
from zopro.engine.local.rollouts import generate
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.train.arguments import scaled_gradients
from zopro.zo import SPSA

PROMPT, ANSWER = 6, 10


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 300, (6, PROMPT + ANSWER), generator=torch.Generator().manual_seed(0))
    return ids, torch.ones_like(ids)


def adapted(kind: str, dtype: torch.dtype) -> Any:
    """Adapters off 0, in float32."""
    model = get_peft_model(
        tiny_model(kind, tiny_tokenizer(), seed=1).to(dtype), LoraConfig(r=4, target_modules="all-linear")
    )
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.1, generator=draw)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_those_of_float32_but_for_rounding(kind: str) -> None:
    ids, mask = batch()
    with torch.no_grad():
        exact, rounded = (
            completion_logprobs(tiny_model(kind, tiny_tokenizer(), seed=1).to(dtype), ids, mask, ANSWER)
            for dtype in (torch.float32, torch.float16)
        )
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=1e-2, rtol=0)
    assert len(rounded.unique()) > 0.9 * rounded.numel(), "not rounded to float16 themselves"


def test_differences_have_the_slope_of_float64() -> None:
    """At the eps that the noise floor chooses; not at the paper's, which lies below the rounding."""
    ids, mask = batch()
    weights = torch.tensor([1.0, -0.5, 0.7, -1.2, 0.3, -0.3])
    wide = adapted("llama", torch.float32).double()
    half = adapted("llama", torch.float16)
    named = [(name, p) for name, p in half.named_parameters() if p.requires_grad]
    assert {p.dtype for _, p in named} == {torch.float32}, "theta stays in float32"

    def loss(model: Any) -> torch.Tensor:
        return (completion_logprobs(model, ids, mask, ANSWER).sum(1) * weights).mean()

    parameters = [p for p in wide.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(wide), parameters)
    errors = {}
    for eps in ("auto", 1e-6):
        spsa = SPSA(named, lr=0.0, eps=eps, queries=4)
        spsa.step(lambda: loss(half))
        true = []
        for query in range(4):
            z = spsa.directions.sample(named, spsa.query_seed(query, 0), 0)
            true.append(sum(float((g * z[name]).sum()) for g, (name, _) in zip(gradients, named, strict=True)))
        difference = torch.tensor(spsa.last.projected_gradients) - torch.tensor(true)
        errors[eps] = float(difference.norm() / torch.tensor(true).norm())
    assert errors["auto"] < 0.05 < 0.5 < errors[1e-6], errors


def test_what_leaves_its_range_is_said() -> None:
    """When a model is first seen, and when it begins later."""
    arguments = {"max_new_tokens": 3, "eos_token_ids": [2], "pad_token_id": 0}
    line = r"are not finite; float16 ends at 65504, .* Set dtype: bfloat16 or float32\.$"
    model = tiny_model("llama", tiny_tokenizer())
    generate(model.half(), [[1, 40]], **arguments)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(6e4)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(6e3)
    with pytest.raises(FloatingPointError, match=line):
        generate(model, [[1, 40]], **arguments)
    with pytest.raises(InputError, match=line):
        generate(copy.deepcopy(model), [[1, 40]], **arguments)


def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervised and reward stages, and steps by function values: what is trained stays float32 and finite."""
    no_report(monkeypatch)
    run = tmp_path / "run"
    options = {"dtype": "float16", "policy_steps": 1, "iterations": 1, "pair_prompts": 2, "eval_prompts": 2}
    pipeline.run(config(write_inputs(tmp_path), run, **options), quiet=True)
    for folder in ("sft", "policy/000", "reward/000", "reward/001"):
        tensors = load_file(run / folder / "adapter_model.safetensors").values()
        assert {t.dtype for t in tensors} == {torch.float32} and all(t.isfinite().all() for t in tensors), folder


def test_back_propagation_scales_its_loss_on_a_gpu() -> None:
    for dtype, device, expected in (
        ("float16", "cuda", {"fp16": True}),
        ("float16", "cpu", {}),
        ("bfloat16", "cuda", {}),
    ):
        model = SimpleNamespace(dtype=resolve_dtype(dtype, torch.device("cpu")), device=torch.device(device))
        assert scaled_gradients(model) == expected
