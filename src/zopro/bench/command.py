"""The command: what can be typed, the measurements one after another, the table of their ratios."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from zopro.bench.options import Work
from zopro.config.values import boolean
from zopro.errors import InputError, Stopped
from zopro.store.shown import several
from zopro.system import progress
from zopro.system.imports import importing
from zopro.system.parent import killed
from zopro.system.terminal import Page, Table

PEERS = {"trl": ("peer", "peer-plain"), "trl-cb": ("peer-cb",)}
ABOUT = {
    "peer": "its defaults",
    "peer-plain": "no gradient checkpointing",
    "peer-cb": "its defaults with transformers' continuous batching",
}
LIBRARIES = ("torch", "transformers", "trl", "peft")

OPTIONS: dict[str, tuple[Callable[[str], Any], str]] = {
    "model": (str, "folder or Hub id (default: random weights of --size)"),
    "size": (str, "shape of a random-weight model: tiny, 0.1b, 1b, 3b or 8b (default: 1b)"),
    "vocab_size": (int, "vocabulary of a random-weight model (default: 128256)"),
    "prompts": (int, "prompts in a step (default: 8)"),
    "num_generations": (int, "completions of each prompt, K (default: 4)"),
    "prompt_length": (int, "tokens of a prompt (default: 100)"),
    "completion_length": (int, "tokens of a completion (default: 32)"),
    "lora_r": (int, "rank of the adapters on all linear layers; 0: all parameters (default: 8)"),
    "dtype": (str, "auto, float32, bfloat16 or float16 (default: auto)"),
    "load_in_4bit": (boolean, "true: weights in 4 bits, by bitsandbytes (default: false)"),
    "load_in_8bit": (boolean, "true: in 8 bits (default: false)"),
    "device": (str, "auto, cpu, cuda or mps (default: auto)"),
    "threads": (int, "CPU threads (default: torch's choice)"),
    "beta": (float, "KL coefficient; above 0 a reference pass is part of the step (default: 0.05)"),
    "sides": (int, "2: central differences, 1: forward differences (default: 2)"),
    "evaluation": (str, "sequential, both sides together in one pass, or all queries batched (default: sequential)"),
    "queries": (int, "directions averaged in a step (default: 1)"),
    "directions": (
        str,
        "targeted, as method zopro's, or gaussian, rademacher or low_rank noise alone (default: targeted)",
    ),
    "steps": (int, "steps measured after one to warm up (default: 5)"),
    "seed": (int, "seed of prompts, weights and directions (default: 0)"),
}


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="a step's cost beside the floor of its forward passes, and beside TRL",
        description="Measure one policy step: seconds by phase, the bare forward passes it cannot do without, memory.",
    )
    command.add_argument("what", metavar="step", choices=["step"], help="what to measure: a step")
    for name, (kind, text) in OPTIONS.items():
        flag = f"--{name.replace('_', '-')}"
        command.add_argument(flag, dest=name, type=kind, default=argparse.SUPPRESS, metavar="VALUE", help=text)
    command.add_argument(
        "--peer",
        metavar="NAME",
        help="also measure this trainer on the same work: trl, or trl-cb (continuous batching; on a GPU)",
    )
    command.set_defaults(handler=_bench)
    return command


def _bench(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    chosen = {name: value for name, value in vars(args).items() if name in OPTIONS}
    if not chosen.get("lora_r", 8):
        chosen.setdefault("beta", 0.0)
    measured = bench_step(Work(**chosen), args.peer, say=progress.say)
    return measured, table(measured)


def bench_step(work: Work, peer: str | None = None, say: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Measure one policy step.

    Returns:
        step_s, floor_s, floor_ratio, phases and floor_phases (seconds), peak_mb, inference_peak_mb, memory_ratio; with
        a peer peer_step_s, peer_peak_mb (its defaults), peer_plain_step_s, peer_plain_peak_mb (without gradient
        checkpointing), and the ratios to ours, speed_ratio, peer_memory_ratio and the same with `plain_`; of trl-cb
        all these with `cb_`.

    Raises:
        InputError: an unknown peer, or one that the device does not suit, or the model cannot be loaded.
        Stopped: a measurement gave out.
    """
    if peer is not None and peer not in PEERS:
        raise InputError(f"peer: must be one of {', '.join(PEERS)}, got {peer!r}.")
    if peer == "trl-cb" and _device(work) == "cpu":
        raise InputError("peer: must be trl on a CPU, got 'trl-cb', whose cache takes most of the machine's memory.")
    say(f"{several(work.steps, 'step')} after one to warm up, with the floor between them")
    result = _measured("step", work)
    result.pop("peak_mb")
    say(f"step {result['step_s']:.3f} s, floor {result['floor_s']:.3f} s, ratio {result['floor_ratio']:.3f}")
    say("peak memory of a step, and of generating the same batch")
    result["peak_mb"] = _measured("step-memory", work)["peak_mb"]
    result["inference_peak_mb"] = _measured("inference-memory", work)["peak_mb"]
    result["memory_ratio"] = result["peak_mb"] / result["inference_peak_mb"]
    say(f"{result['peak_mb']:.0f} MB and {result['inference_peak_mb']:.0f} MB, ratio {result['memory_ratio']:.3f}")
    for kind in PEERS[peer] if peer else ():
        say(f"TRL RLOO, first-order, {ABOUT[kind]}")
        (name, plain), measured = _names(kind), _measured(kind, work)
        say(f"step {measured['step_s']:.3f} s, {measured['peak_mb']:.0f} MB")
        result |= {f"{name}_step_s": measured["step_s"], f"{name}_peak_mb": measured["peak_mb"]}
        result[f"{plain}speed_ratio"] = measured["step_s"] / result["step_s"]
        result[f"{plain}peer_memory_ratio"] = measured["peak_mb"] / result["peak_mb"]
    versions = {name: version(name) for name in LIBRARIES} | {"python": platform.python_version()}
    return {**result, "work": asdict(work), "machine": _machine(), "versions": versions}


def _names(kind: str) -> tuple[str, str]:
    """How a peer's results begin, and their ratios to ours."""
    name = kind.replace("-", "_")
    return name, "" if kind == "peer" else name.removeprefix("peer_") + "_"


def _measured(kind: str, work: Work) -> dict[str, Any]:
    with progress.task(f"measuring {kind}"):
        return _run(kind, work)


def _device(work: Work) -> str:
    from zopro.engine.local.models import resolve_device

    return resolve_device(work.device).type


def _run(kind: str, work: Work) -> dict[str, Any]:
    """In this process on a GPU, whose allocator knows its peak, since imports take it 13 to 30 s; else in a fresh one."""
    if _device(work) != "cuda":
        return _apart(kind, work)
    import torch

    with importing():
        from zopro.bench import kinds
    gc.collect()
    torch.cuda.empty_cache()  # what the last kind left
    return kinds.measure(kind, work)


def _apart(kind: str, work: Work) -> dict[str, Any]:
    environment = dict(os.environ)
    if work.threads:
        environment["OMP_NUM_THREADS"] = str(work.threads)
    process = subprocess.run(
        [sys.executable, "-m", "zopro.bench.worker", kind, str(os.getpid())],
        input=json.dumps(asdict(work)),
        env=environment,
        capture_output=True,
        text=True,
    )
    if (code := process.returncode) < 0:
        raise Stopped(f"bench: the measurement '{kind}' was {killed(code)}.")
    if code:
        lines = process.stderr.strip().splitlines() or [f"exit code {code}"]
        raise Stopped(f"bench: the measurement '{kind}' failed: {lines[-1]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    if "error" in result:
        raise (InputError if result["code"] == 2 else Stopped)(result["error"])
    return result


def _machine() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _millions(number: int) -> str:
    return f"{number / 1e6:.{0 if number >= 1e7 else 1}f}"


def table(result: dict[str, Any]) -> Page:
    """The measurements for people."""
    work, phases, floors = result["work"], result["phases"], result["floor_phases"]
    adapter = f"LoRA r = {work['lora_r']}" if work["lora_r"] else "all parameters"
    head = [
        f"{work['model'] or 'random weights, ' + work['size']}: {_millions(result['parameters'])} M parameters, "
        f"{result['dtype']}, {adapter}",
        f"{several(work['prompts'], 'prompt')} of {work['prompt_length']} tokens x K = {work['num_generations']}, "
        f"{several(work['completion_length'], 'new token')}, beta {work['beta']}, {work['sides']}-sided"
        f"{'' if work['evaluation'] == 'sequential' else ' ' + work['evaluation']}, "
        f"{several(work['queries'], 'direction')}",
        f"{result['machine']}, {several(result['threads'], 'thread')}; "
        + ", ".join(f"{name} {number}" for name, number in result["versions"].items()),
    ]
    rows = [("", "step", "floor")]
    rows += [(name, f"{s:.3f} s", f"{floors[name]:.3f} s" if name in floors else "") for name, s in phases.items()]
    rows.append(("all", f"{result['step_s']:.3f} s", f"{result['floor_s']:.3f} s"))
    lines = [f"step / floor {result['floor_ratio']:.3f}", ""]
    lines.append(
        f"peak memory {result['peak_mb']:.0f} MB, of generating the same batch {result['inference_peak_mb']:.0f} MB: "
        f"ratio {result['memory_ratio']:.3f}"
    )
    for kind, what in ABOUT.items():
        name, prefix = _names(kind)
        if f"{name}_step_s" in result:
            lines.append(
                f"TRL RLOO, {what}: {result[f'{name}_step_s']:.3f} s ({result[f'{prefix}speed_ratio']:.2f}x ours), "
                f"{result[f'{name}_peak_mb']:.0f} MB ({result[f'{prefix}peer_memory_ratio']:.2f}x ours)"
            )
    return Page(*head, "", Table(rows, right=True), *lines)
