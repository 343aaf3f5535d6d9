"""Memory and time of the analysis: 100 checkpoints of 50M parameters, made on the spot, against reading them once.

    python benchmarks/analysis_memory.py --folder SCRATCH       # 20 GB in float32; deleted afterwards

Fifty policies and fifty reward models in float32, as whole models of 12 layers (`--lora`: as adapters of rank 8). The
analysis runs in a process of its own, whose peak resident memory is reported; before it and before the plain reading the
files are dropped from the page cache, so that both wait for the disk. Exits with 1 if a bound is broken: 1 GB, and twice
the time of reading the files once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, RANK = 12, 8
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tensors(parameters: int, lora: bool, generator: torch.Generator, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """One checkpoint of about this many parameters."""
    each = parameters // (LAYERS * len(MODULES))
    found = {}
    for layer in range(LAYERS):
        for module in MODULES:
            name = f"model.layers.{layer}.{module}"
            if lora:
                width = each // (2 * RANK)
                found[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=generator).to(dtype)
                found[f"{name}.lora_B.weight"] = torch.randn(width, RANK, generator=generator).to(dtype)
            else:
                found[f"{name}.weight"] = torch.randn(each // 512, 512, generator=generator).to(dtype)
    return found


def make(folder: Path, checkpoints: int, parameters: int, lora: bool, dtype: torch.dtype) -> None:
    """Random walks: every checkpoint is the one before plus noise."""
    for side in ("policy", "reward"):
        generator = torch.Generator().manual_seed(len(side))
        state = tensors(parameters, lora, generator, dtype)
        noise = tensors(parameters, lora, generator, dtype)
        for step in range(checkpoints // 2):
            place = folder / side / f"checkpoint-{step}"
            place.mkdir(parents=True)
            save_file(state, place / ("adapter_model.safetensors" if lora else "model.safetensors"))
            if lora:
                (place / "adapter_config.json").write_text(json.dumps({"lora_alpha": 16, "r": RANK}))
            # The same noise rolled: drawing 50M normal numbers a hundred times would take longer than the analysis.
            for name in state:
                state[name] = state[name] + 0.1 * noise[name].roll(7919 * (step + 1)).view(state[name].shape)


def forget(folder: Path) -> None:
    """Drop the files from the page cache."""
    for file in folder.rglob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_once(folder: Path) -> float:
    """Seconds to read every file from start to end."""
    start = time.perf_counter()
    buffer = memoryview(bytearray(8 << 20))
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - start


def analyse(folder: Path) -> None:
    """What the process of its own does."""
    from zopro.analysis.analyse import analyse as run
    from zopro.analysis.reading.checkpoints import of_folder

    start = time.perf_counter()
    found = run(*(of_folder(folder / side, side) for side in ("policy", "reward")))
    seconds = time.perf_counter() - start
    # Not ru_maxrss, which a process inherits from the one that starts it, and that one has made 20 GB of tensors.
    status = Path("/proc/self/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024 / 1e9
    cpu = time.process_time()
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_rss_gb": peak, "dimension": found["dimension"]}))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder on the disk to measure")
    parser.add_argument("--checkpoints", type=int, default=100, help="of both together (default: 100)")
    parser.add_argument("--parameters", type=int, default=50_000_000, help="of each (default: 50 million)")
    parser.add_argument("--lora", action="store_true", help="adapters of rank 8, both views, instead of whole models")
    parser.add_argument("--half", action="store_true", help="bfloat16: half the disk")
    parser.add_argument("--only-analyse", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_analyse:
        analyse(args.folder)
        return 0
    args.folder.mkdir(parents=True)
    try:
        make(args.folder, args.checkpoints, args.parameters, args.lora, torch.bfloat16 if args.half else torch.float32)
        size = sum(file.stat().st_size for file in args.folder.rglob("*.safetensors")) / 1e9
        forget(args.folder)
        reading = read_once(args.folder)
        forget(args.folder)
        command = [sys.executable, __file__, "--folder", str(args.folder), "--only-analyse"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    finally:
        shutil.rmtree(args.folder)
    result = {"checkpoints": args.checkpoints, "gigabytes": size, "read_once_seconds": reading, **found}
    result["ratio"] = found["seconds"] / reading
    print(json.dumps({key: round(x, 3) if isinstance(x, float) else x for key, x in result.items()}, indent=2))
    return int(found["peak_rss_gb"] > 1 or result["ratio"] > 2)


if __name__ == "__main__":
    sys.exit(main())
