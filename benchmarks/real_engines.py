"""Starts each real engine on a small model, waits until it is healthy, runs its tests, and stops it.

    python benchmarks/real_engines.py MODEL                       # a folder with safetensors and model.gguf
    python benchmarks/real_engines.py MODEL --vllm PYTHON         # of an environment with vLLM, or its CPU build

An engine that is not installed is named and passed over; exit code 1 if a test failed. Of vLLM what
tests/engine/servers/test_vllm.py has, against MODEL; of llama.cpp its tests, and a first look at MODEL/model.gguf.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def has(python: str, module: str) -> bool:
    return (
        subprocess.run([python, "-c", f"import importlib.util as u; exit(not u.find_spec('{module}'))"]).returncode == 0
    )


def tests(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def vllm(python: str, model: Path) -> int:
    if not has(python, "vllm"):
        print(f"vLLM: not installed for {python}; see docs/serving.md, and name its Python with --vllm")
        return 0
    import torch

    from zopro.config.model import ModelOptions
    from zopro.engine.opening import end, open_base
    from zopro.system.progress import reporting

    options = ModelOptions(model=str(model), engine="vllm", vllm_python=python, dtype="float32")
    with reporting():
        base: Any = open_base(options, torch.device("cpu"))
    try:
        (server,) = base.served_by.servers
        print(f"vLLM: healthy at {server.url}, {model}")
        own = {"ZOPRO_VLLM": server.url, "ZOPRO_VLLM_MODEL": str(model), "VLLM_API_KEY": server.key}
        return tests("tests/engine/servers/test_vllm.py", "-k", "real", **own)
    finally:
        end(base)


def llamacpp(model: Path) -> int:
    if not has(sys.executable, "xllamacpp"):
        print("llama.cpp: not installed; pip install '.[llamacpp]'")
        return 0
    failed = tests("tests/engine/servers/test_llamacpp.py", "tests/loop/test_llamacpp_run.py")
    if not (file := model / "model.gguf").is_file():
        print(f"llama.cpp: no {file} to look at")
        return failed
    look = (
        "import sys; from zopro.engine import Sampling; from zopro.engine.servers.check import check_engine\n"
        "from zopro.engine.servers.llamacpp.engine import LlamaCppEngine; from zopro.zo import Gaussian\n"
        "engine = LlamaCppEngine.of(sys.argv[1], 4, 8.0, Gaussian())\n"
        "print(*check_engine(engine, [[1, 2, 3]], Sampling(8, [2], 0), differences=False), sep='\\n')"
    )
    return failed or subprocess.run([sys.executable, "-c", look, str(file)], cwd=ROOT).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a small instruct model")
    parser.add_argument("--vllm", default=sys.executable, metavar="PYTHON", help="of the environment that has vLLM")
    parser.add_argument("--only", choices=("vllm", "llamacpp"), help="one of them")
    args = parser.parse_args()
    model = args.model.absolute()
    codes = [
        0 if args.only == "llamacpp" else vllm(args.vllm, model),
        0 if args.only == "vllm" else llamacpp(model),
    ]
    raise SystemExit(int(any(codes)))


if __name__ == "__main__":
    main()
