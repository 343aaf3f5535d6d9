"""Members of a population in one pass of the base weights against one after another: answers a second, and memory.

Both ways take turns in one process, so that their ratio does not depend on what else the machine does. Peak memory is
that of a process of its own for each way, beside one that samples as many rows at theta.

    python benchmarks/members.py MODEL [--members 32] [--prompts 4] [--tokens 16] [--begin 28] [--displaced lora_B]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from zopro.engine import Sampling
from zopro.engine.local import prefix
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.prefix import LEAST_SAVED
from zopro.engine.local.rollouts import MAX_BATCH_TOKENS
from zopro.system.memory import peak_rss_mb
from zopro.zo import Displacement, Gaussian, LowRank, Weights

WAYS = ("together", "whole", "apart", "theta")  # whole: together, and each row reads its whole prompt


def build(args: argparse.Namespace) -> tuple[LocalEngine, list[list[int]], list[Displacement | None]]:
    """An engine over the model, with adapters if they have a rank, prompts of 24 to 36 tokens, and the members."""
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model: Any = base
    if args.rank:
        targets = args.targets.split(",") if "," in args.targets else args.targets
        model = get_peft_model(base, LoraConfig(r=args.rank, target_modules=targets))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad and (args.displaced in n or not args.rank)]
    draw = torch.Generator().manual_seed(0)
    lengths = [24 + 4 * (n % 4) for n in range(args.prompts)]
    prompts = [torch.randint(100, 10_000, (length,), generator=draw).tolist() for length in lengths]
    if args.begin:  # as chat templates do; 12 to 24 tokens follow
        begin = torch.randint(100, 10_000, (args.begin,), generator=draw).tolist()
        prompts = [begin + prompt[: len(prompt) - 12] for prompt in prompts]
    at = [Displacement(0, query, 0, t, (1e-3,)) for query in range(args.members // 2) for t in (1.0, -1.0)]
    return LocalEngine(model, Weights.of(named, Gaussian() if args.rank else LowRank(1))), prompts, at


def sample(args: argparse.Namespace, setting: tuple[Any, Any, Any], way: str) -> float:
    """Processor seconds for all members, which other processes change little; no answer ends before its last token."""
    engine, prompts, at = setting
    at, members, tokens = at[: args.apart] if way == "apart" else at, len(at), args.tokens
    options = Sampling(tokens, [-1], 0, generator=torch.Generator().manual_seed(1))
    engine.member_tokens = MAX_BATCH_TOKENS if way in ("together", "whole") else 0
    prefix.LEAST_SAVED = sys.maxsize if way == "whole" else LEAST_SAVED
    began = time.process_time()
    if way == "theta":  # as many rows, all of theta
        engine.sample(prompts * len(at), 1, options)
    else:
        engine.sample(prompts, 1, options, at)
    if way in ("together", "whole") and not engine.member_tokens:
        raise SystemExit("the members did not go together")
    return (time.process_time() - began) * members / len(at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--members", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument(
        "--begin", type=int, default=0, help="tokens that all prompts begin with, before 12 to 24 of their own"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=8, help="of adapters; 0: full parameters, with noise of rank 1")
    parser.add_argument("--targets", default="all-linear")
    parser.add_argument("--displaced", default="lora_", help="of the adapters, those with this in their names")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--apart", type=int, default=4, help="members timed one after another, for all of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = build(args)
    if args.only:
        sample(args, setting, args.only)
        print(json.dumps(peak_rss_mb()))
        return
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for repeat in range(args.repeats + 1):
        for way in WAYS:
            taken = sample(args, setting, way)
            if repeat:
                seconds[way].append(taken)
                print(f"{way}: {taken:.2f} s", flush=True)
    rates = {way: args.members / median(values) for way, values in seconds.items()}
    peaks = {way: _peak(way) for way in WAYS}
    for way in WAYS:
        print(f"{way}: {rates[way]:.2f} members a processor second, {rates[way] / rates['apart']:.2f} of apart; "
              f"peak {peaks[way]:.0f} MB, {peaks[way] / peaks['theta']:.2f} of theta")  # fmt: skip


def _peak(way: str) -> float:
    """MB of a process that does nothing else."""
    done = subprocess.run([sys.executable, *sys.argv, "--only", way], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
