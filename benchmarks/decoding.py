"""What decoding's own products and cache gain over MKL's products and transformers' cache.

    python benchmarks/decoding.py --threads 2                    # products of few rows, random weights
    python benchmarks/decoding.py --threads 2 --model PATH       # and rollouts of a model

Rollouts are timed with both, then without each, in turn; the best of --repeats counts. Nothing else should run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from unittest import mock

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from zopro.engine.local import few_rows, rollouts
from zopro.system.heap import return_freed_memory

SHAPES = ((262144, 640), (2048, 640), (640, 2048))  # of weights (out, in): the 270M model's head and MLP
VARIANTS = {
    "both": nullcontext(),
    "with MKL's products": mock.patch.object(few_rows, "FEW", range(0)),
    "with DynamicCache": mock.patch.object(rollouts, "growing_cache", lambda config: DynamicCache(config=config)),
}


def timed(work: Callable[..., object], *arguments: object) -> float:
    """Seconds."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def multiply(product: Callable[..., torch.Tensor], x: torch.Tensor, weights: Sequence[torch.Tensor]) -> None:
    for weight in weights:
        product(x, weight)


@torch.no_grad()
def products(rows: Sequence[int], repeats: int) -> None:
    print("| weight | rows | MKL | tiles | times |\n|---|---|---|---|---|")
    for shape in SHAPES:
        weights = [torch.randn(shape) for _ in range(max(1, 2**24 // (shape[0] * shape[1])))]  # beyond any cache
        for count in rows:
            x = torch.randn(count, 1, shape[1])
            mkl, tiles = (
                min(timed(multiply, product, x, weights) for _ in range(repeats)) / len(weights) * 1e3
                for product in (functional.linear, few_rows.linear)
            )
            print(f"| {shape[0]} x {shape[1]} | {count} | {mkl:.2f} ms | {tiles:.2f} ms | {mkl / tiles:.2f} |")


def rollout(model: PreTrainedModel, prompts: int, copies: int, prompt_length: int, new: int) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, model.config.vocab_size, (prompts, prompt_length), generator=generator).tolist()
    rollouts.generate(
        model,
        tokens,
        num_generations=copies,
        max_new_tokens=new,
        eos_token_ids=[],
        pad_token_id=0,
        generator=generator,
    )


def all_rollouts(model: PreTrainedModel, args: argparse.Namespace) -> None:
    print(f"\n| prompts x K | {' | '.join(VARIANTS)} |\n|---|{'---|' * len(VARIANTS)}")
    for batch in args.batches:
        shape = (*map(int, batch.split("x")), args.prompt_length, args.completion_length)
        seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
        for _ in range(args.repeats):
            for name, variant in VARIANTS.items():
                with variant:
                    seconds[name].append(timed(rollout, model, *shape))
        print(f"| {batch} | {' | '.join(f'{min(each):.2f} s' for each in seconds.values())} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="whose rollouts are timed; none: products alone")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="*", default=[4, 8, 16, 32, 40])
    parser.add_argument("--batches", nargs="+", default=["2x4", "8x2", "8x4"], help="prompts x completions of each")
    parser.add_argument("--prompt_length", type=int, default=100)
    parser.add_argument("--completion_length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return_freed_memory()
    if args.rows:
        products(args.rows, max(8, args.repeats))
    if args.model:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
        all_rollouts(model, args)


if __name__ == "__main__":
    main()
