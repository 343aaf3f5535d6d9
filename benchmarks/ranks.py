"""Seconds of one policy step on 1, 2, ... processes that share the same batch, and what the parts say of more.

    python benchmarks/ranks.py --size 0.1b --prompts 8 --processes 1,2
    python benchmarks/ranks.py --model gemma-3-270m --processes 1,2 --out ranks.json

Each process has one CPU thread, or one GPU with --device cuda. Run it with as many idle cores as processes. The parts
of the one process's step and the time of an exchange make the model of docs/scaling.md, printed for 8, 64 and 1024.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

SHARED = ("rollout", "scoring", "reference", "log-probs")  # with half the rows of a batch, half the work
EXCHANGES = 200
SIZES = (8, 64, 1024)


def worker(options: dict[str, Any]) -> None:
    """Measure on this process; the first one prints the result as the last line."""
    import torch.distributed as dist

    from zopro.bench.clock import Watch
    from zopro.bench.measure import _Steps, step_trainer
    from zopro.bench.work import Work, build
    from zopro.system.launch import counted, see_one_gpu
    from zopro.system.ranks import launched
    from zopro.zo import Ranks

    warnings.filterwarnings("ignore")
    if options["device"] != "cpu":
        see_one_gpu()
    work, sizes = Work(**options), list[int]()
    with tempfile.TemporaryDirectory() as folder:
        setting = build(work)
        watch = Watch(setting.policy.device)
        trainer = step_trainer(setting, work.steps + 1, folder, watch)
        steps = _Steps(watch, lambda: None)
        trainer.add_callback(steps)
        with counted(sizes.append):
            trainer.train()
    seconds = []
    if launched() > 1:
        ranks = Ranks(device=trainer.accelerator.device)
        for _ in range(EXCHANGES):
            start = time.perf_counter()
            ranks.gather([1.0, 2.0])
            seconds.append(time.perf_counter() - start)
    measured = steps.steps[1:]
    result = {
        "processes": launched(),
        "step_s": median(step["total"] for step in measured),
        "parts": {name: median(step.get(name, 0.0) for step in measured) for name in (*SHARED, "perturb", "update")},
        "exchanges": len(sizes) / (work.steps + 1),
        "exchanged_bytes": trainer.exchanged_bytes,
        "exchange_s": median(seconds) if seconds else 0.0,
    }
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result), flush=True)
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(processes: int, options: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    command += [__file__, "--worker", json.dumps(options)]
    run = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return found


def predicted(one: dict[str, Any], exchanges: float, latency: float, processes: int) -> tuple[float, float]:
    """Seconds of a step on `processes`, the batch shared out, and with as many prompts on each as one has here.

    docs/scaling.md derives it: A / N + B + n a log2 N, and A + B + n a log2 N.
    """
    shared = sum(one["parts"][name] for name in SHARED)
    fixed, waiting = one["step_s"] - shared, exchanges * latency * math.log2(processes)
    return shared / processes + fixed + waiting, shared + fixed + waiting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--processes", default="1,2", help="how many, comma separated, 1 first (default: 1,2)")
    for name, default in (("model", ""), ("size", "0.1b"), ("dtype", "float32"), ("device", "cpu"), ("out", "")):
        parser.add_argument(f"--{name}", default=default)
    lengths = {"vocab-size": 32768, "prompts": 8, "num-generations": 4, "prompt-length": 100, "completion-length": 32}
    for name, number in {**lengths, "queries": 1, "steps": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = vars(parser.parse_args())
    if program := options.pop("worker"):
        worker(json.loads(program))
        return
    counts, out = [int(word) for word in options.pop("processes").split(",")], options.pop("out")
    options["threads"] = 1
    found = [launch(count, options) for count in counts]
    one = found[0]
    for each in found:
        efficiency = one["step_s"] / each["step_s"] / each["processes"]
        parts = "  ".join(f"{name} {seconds:.3f}" for name, seconds in each["parts"].items())
        print(
            f"{each['processes']:>3} processes  step {each['step_s']:.3f} s  efficiency {efficiency:.2f}  {parts}  "
            f"{each['exchanges']:.0f} exchanges, {each['exchanged_bytes']} bytes, {each['exchange_s'] * 1e6:.0f} us each"
        )
    last = found[-1]
    latency = last["exchange_s"] / max(1.0, math.log2(last["processes"]))
    for size in SIZES:
        same, more = predicted(one, last["exchanges"], latency, size)
        print(
            f"{size:>4} processes, model: the same batch {same:.3f} s (efficiency {one['step_s'] / same / size:.2f}), "
            f"{options['prompts']} prompts on each {more:.3f} s (efficiency {one['step_s'] / more:.2f})"
        )
    if out:
        Path(out).write_text(json.dumps({"options": options, "found": found}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
