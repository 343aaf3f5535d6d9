"""One measurement in a process of its own, so that its peak memory is its own: `python -m zopro.bench.worker KIND`.

Reads a `Work` as JSON from stdin; the last line of stdout is the result as JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import resource
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from zopro.bench import measure as steps  # by every kind, so that the libraries are in every kind's memory
from zopro.bench.work import Work, build
from zopro.errors import InputError

KINDS = ("step", "step-memory", "inference-memory", "peer", "peer-plain")


def main() -> int:
    kind, work = sys.argv[1], Work(**json.load(sys.stdin))
    warnings.filterwarnings("ignore")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result = measure(kind, work)
    except InputError as error:
        result = {"error": str(error)}
    print(json.dumps(result))
    return 0


def measure(kind: str, work: Work) -> dict[str, Any]:
    """The result of one kind of measurement; `peak_mb` counts from after the model is loaded."""
    if kind == "step-memory":
        work = dataclasses.replace(work, steps=1)
    setting = build(work, classifier=kind != "inference-memory")
    device = setting.policy.device
    about = {"parameters": setting.parameters, "dtype": str(setting.policy.dtype).removeprefix("torch."),
             "device": device.type, "threads": torch.get_num_threads()}  # fmt: skip
    gc.collect()
    forget_peak(device)
    result: dict[str, Any] = {}
    if kind == "inference-memory":
        _generate(setting)
    elif kind == "step":
        result = steps.measure_step(setting)
    elif kind == "step-memory":
        with tempfile.TemporaryDirectory() as folder:
            steps.step_trainer(setting, 2, folder).train()
    else:
        result = steps.measure_peer(setting, checkpointing=kind == "peer")
    return {**about, **result, "peak_mb": peak_mb(device)}


def _generate(setting: Any) -> None:
    from zopro.engine.rollouts import generate

    for _ in range(2):
        generate(
            setting.policy,
            setting.prompt_ids,
            num_generations=setting.work.num_generations,
            max_new_tokens=setting.work.completion_length,
            eos_token_ids=-1,
            pad_token_id=setting.tokenizer.pad_token_id,
        )


def forget_peak(device: torch.device) -> None:
    """Let the peak count from here: loading a model takes more than running it. Linux and CUDA only."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB (1e6 bytes): CUDA's allocator, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


if __name__ == "__main__":
    sys.exit(main())
