"""Starts each real engine on a small model, waits until it is healthy, runs its tests, and stops it.

    python benchmarks/real_engines.py MODEL                       # a folder with safetensors and model.gguf
    python benchmarks/real_engines.py MODEL --vllm PYTHON         # of an environment with vLLM, or its CPU build

An engine that is not installed is named and passed over; exit code 1 if a test failed. Of vLLM what
tests/engine/servers/test_vllm.py has, against MODEL; of llama.cpp its tests, and a first look at MODEL/model.gguf.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
START = 600  # seconds for a server to become healthy
FLAGS = (
    "--dtype float32 --enable-lora --max-loras 4 --max-lora-rank 8 --enforce-eager --no-enable-prefix-caching "
    "--max-model-len 512 --lora-target-modules qkv_proj o_proj gate_up_proj down_proj"
)


def has(python: str, module: str) -> bool:
    return (
        subprocess.run([python, "-c", f"import importlib.util as u; exit(not u.find_spec('{module}'))"]).returncode == 0
    )


@contextmanager
def server(python: str, model: Path, log: Path) -> Iterator[str]:
    """The address of a vLLM server; stopped at the end, with all that it started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", *FLAGS.split()],
            env={"OMP_NUM_THREADS": "1", **os.environ, **own},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        url, until = f"http://127.0.0.1:{port}", time.monotonic() + START
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(
                    f"vLLM did not start; the end of {log}:\n" + "\n".join(log.read_text().splitlines()[-15:])
                )
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def healthy(url: str) -> bool:
    try:
        return bool(urllib.request.urlopen(f"{url}/health", timeout=2).status == 200)
    except OSError:
        return False


def tests(*arguments: str, **environment: str) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


def vllm(python: str, model: Path) -> int:
    if not has(python, "vllm"):
        print(f"vLLM: not installed for {python}; see docs/serving.md, and name its Python with --vllm")
        return 0
    log = Path("vllm-server.log").absolute()
    with server(python, model, log) as url:
        print(f"vLLM: healthy at {url}, {model}")
        return tests("tests/engine/servers/test_vllm.py", "-k", "real", ZOPRO_VLLM=url, ZOPRO_VLLM_MODEL=str(model))


def llamacpp(model: Path) -> int:
    if not has(sys.executable, "xllamacpp"):
        print("llama.cpp: not installed; pip install 'zopro[llamacpp]'")
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
