"""A pass over answers of a bfloat16 model with LoRA: adapters by PEFT's steps, in one product, added in place, and none.

    OMP_NUM_THREADS=1 python benchmarks/lora_products.py --model PATH [--ranks 8,64]

Each row is the best of --repeats passes over the same 8 x 4 answers, in turns. Its error is that of a token's log-prob
against the same weights in float32, root mean square. Needs a CPU with bfloat16 instructions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from zopro.engine.local import lora
from zopro.engine.local.logprobs import completion_logprobs

PEFT = "PEFT's steps"
PROMPTS, COPIES, PROMPT_LENGTH, ANSWER_LENGTH = 8, 4, 70, 40


def adapted(path: str, rank: int, dtype: torch.dtype) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.02 if "lora_A" in name else 0.01)
    return model.eval()


def answers(vocabulary: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = PROMPTS * COPIES, ANSWER_LENGTH
    prompts = torch.randint(5, vocabulary, (PROMPTS, PROMPT_LENGTH), generator=generator).repeat_interleave(COPIES, 0)
    return torch.cat([prompts, torch.randint(5, vocabulary, shape, generator=generator)], dim=1)


@torch.no_grad()
def logprobs(model: PeftModel, ids: Tensor) -> Tensor:
    return completion_logprobs(model, ids, torch.ones_like(ids), ANSWER_LENGTH, num_generations=COPIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--ranks", default="8,64")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if not lora.multiplies_bfloat16():
        sys.exit("This CPU has no bfloat16 instructions, so adapters always take PEFT's steps.")
    print("| rank | adapters | seconds | of PEFT's | error of a token, nats |\n|---|---|---|---|---|")
    for rank in map(int, args.ranks.split(",")):
        exact = adapted(args.model, rank, torch.float32)
        ids = answers(exact.config.vocab_size)
        expected = logprobs(exact, ids)
        del exact
        model = adapted(args.model, rank, torch.bfloat16)
        ways: dict[str, tuple[object, Callable[[], AbstractContextManager[object]]]] = {
            PEFT: (None, nullcontext),
            "one product": (lora._InOneProduct, nullcontext),
            "added in place": (lora._Added, nullcontext),
            "none": (None, model.disable_adapter),
        }
        best = dict.fromkeys(ways, float("inf"))
        errors = {}
        for _ in range(args.repeats):
            for name, (way, context) in ways.items():
                lora._way = lambda *given, way=way: way
                with context():
                    start = time.perf_counter()
                    found = logprobs(model, ids)
                    best[name] = min(best[name], time.perf_counter() - start)
                errors[name] = float((found - expected).square().mean().sqrt())
        for name, seconds in best.items():
            error = f"{errors[name]:.4f}" if name != "none" else ""
            print(f"| {rank} | {name} | {seconds:.2f} | {seconds / best[PEFT]:.2f} | {error} |", flush=True)


if __name__ == "__main__":
    main()
