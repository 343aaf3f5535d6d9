"""Cosine of residual feedback with autograd's gradient, layer by layer, on a model folder of your own.

The loss is RLOO's on completions that the model itself samples, with random advantages. Adapters are LoRA on all linear
layers, with a B away from 0 (`--scale`), as after some training; everything runs in float32. Beside the cosine stands
what it means for Adam, whose first step goes along the sign of the gradient: the slope along the guess's sign over
that along the gradient's own.

    python benchmarks/feedback_cosine.py --model PATH [--prompts 4] [--tokens 24] [--local none,block] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from zopro.engine import Batch
from zopro.engine.feedback import LOCAL, Feedback
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.models import load_base
from zopro.engine.local.rollouts import generate
from zopro.text.frame import declared_stops, frame_of
from zopro.text.tokenizer import load_tokenizer
from zopro.weights.adapters import tensor_name

PROMPTS = (
    "The best way to learn a new language is",
    "When the train finally arrived at the station,",
    "To make a good cup of tea, you first",
    "The committee decided last week that",
    "My favourite thing about living by the sea is",
    "In the early morning the market",
    "Scientists have recently discovered that",
    "She opened the letter and read:",
)


def cosine(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Cosine of two lists of tensors taken as one vector each."""
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    norms = [sum(float(x.double().square().sum()) for x in side) ** 0.5 for side in (a, b)]
    return dot / (norms[0] * norms[1]) if norms[0] * norms[1] > 0 else 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Cosines and seconds of each kind of feedback beside autograd's."""
    torch.manual_seed(options.seed)
    tokenizer = load_tokenizer(options.model)
    base = load_base(options.model, torch.float32, torch.device("cpu")).requires_grad_(False)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=options.scale)
    texts = [" ".join((PROMPTS * 2)[first : first + options.sentences]) for first in range(options.prompts)]
    prompts = [(tokenizer.bos_token or "") + text for text in texts]
    rollout = generate(
        model,
        tokenizer(prompts, add_special_tokens=False)["input_ids"],
        num_generations=2,
        max_new_tokens=options.tokens,
        eos_token_ids=sorted(frame_of(tokenizer, declared_stops(base)).stops),
        pad_token_id=tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(options.seed),
    )
    ids, mask, length = Batch.of(rollout)
    draws = torch.randn(len(ids), generator=torch.Generator().manual_seed(options.seed))
    advantages = draws - draws.view(-1, 2).flip(1).flatten()

    def timed(logprobs: Callable[[], torch.Tensor], tensors: list[Any]) -> tuple[tuple[torch.Tensor, ...], float]:
        start = time.perf_counter()
        loss = -(logprobs().sum(1) * advantages).mean()
        return torch.autograd.grad(loss, tensors), time.perf_counter() - start

    named = {tensor_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    gradients, seconds = timed(
        lambda: completion_logprobs(model, ids, mask, length, num_generations=2), [*named.values()]
    )
    true = dict(zip(named, gradients, strict=True))
    energy = sum(float(gradient.square().sum()) for gradient in true.values())
    total = sum(float(gradient.abs().sum()) for gradient in true.values())
    start = time.perf_counter()
    with torch.no_grad():
        completion_logprobs(model, ids, mask, length, num_generations=2)
    result: dict[str, Any] = {"forward_seconds": time.perf_counter() - start, "autograd_seconds": seconds, "feedback": {}}
    for local in options.local.split(","):
        feedback = Feedback(model, local=local, tail=options.tail)
        run = lambda: feedback.logprobs(ids, mask, length, num_generations=2)  # noqa: B023, E731
        found, seconds = timed(run, [*feedback.parameters.values()])
        guess = dict(zip(feedback.parameters, found, strict=True))
        layers: dict[int, list[str]] = {}
        for name in guess:
            layers.setdefault(feedback.block_of(name), []).append(name)
        result["feedback"][local] = {
            "seconds": seconds,
            "cosine": cosine(list(guess.values()), [true[name] for name in guess]),
            "cosine_all": cosine([guess.get(name, torch.zeros_like(true[name])) for name in true], list(true.values())),
            "adam": sum(float((true[name] * guess[name].sign()).sum()) for name in guess) / total,
            "energy_share": sum(float(true[name].square().sum()) for name in guess) / energy,
            "elements_kept": feedback.elements_kept,
            "by_block": {
                block: cosine([guess[n] for n in names], [true[n] for n in names])
                for block, names in sorted(layers.items())
            },
            "by_tensor": {name: cosine([guess[name]], [true[name]]) for name in guess},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PATH", help="model folder or Hub id")
    parser.add_argument("--prompts", type=int, default=4, choices=range(1, len(PROMPTS) + 1), metavar="N")
    parser.add_argument("--sentences", type=int, default=3, metavar="N", help="of a prompt, about 8 tokens each")
    parser.add_argument("--tokens", type=int, default=24, metavar="N")
    parser.add_argument("--tail", type=int, default=4, help="tokens of the prompts swept by block")
    parser.add_argument("--scale", type=float, default=0.01, help="standard deviation of B (default: 0.01)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local", default=",".join(LOCAL), help="kinds of feedback, comma separated")
    parser.add_argument("--json", metavar="FILE", help="also write everything, tensor by tensor, here")
    options = parser.parse_args()
    result = measure(options)
    print(f"forward pass {result['forward_seconds']:.2f} s, with autograd {result['autograd_seconds']:.2f} s")
    for local, found in result["feedback"].items():
        print(
            f"local={local}: cosine {found['cosine']:.3f} over guided tensors, which hold {found['energy_share']:.2f} of "
            f"the gradient's energy; {found['cosine_all']:.3f} over all; Adam's first step {found['adam']:.3f}; "
            f"{found['seconds']:.2f} s"
        )
        print("  by block: " + " ".join(f"{block}:{value:.2f}" for block, value in found["by_block"].items()))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
