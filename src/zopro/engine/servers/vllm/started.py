"""A vLLM server that zopro starts itself, and stops: `engine: vllm`.

server = start(options, ["q_proj", "v_proj"])      # healthy, on a free port of this machine
server.stop()

vLLM has its own Python (`vllm_python`): it pins other versions of PyTorch and transformers than zopro's. What a server
needs to serve a run stands here alone; docs/serving.md tells users the same, which a test looks at.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from zopro.config.addresses import VLLM_KEY
from zopro.config.model import ModelOptions
from zopro.engine.servers.vllm import keeper
from zopro.engine.servers.vllm.client import Failed, Server
from zopro.errors import InputError
from zopro.system.progress import task
from zopro.system.ranks import launched

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
SLOTS = 8  # displaced policies in one batch
ENVIRONMENT = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
# A seeded row whose prompt is cut by a full batch takes its draw back, which a CPU's generator cannot: the server ends.
ON_CPU = ("--enforce-eager", "--no-enable-prefix-caching", "--no-enable-chunked-prefill")
ENVIRONMENT_ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "4"}  # unless they are set
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR"}  # unless it is set: else two lines for every displacement
START = 3600.0  # seconds for a server to answer, which may have to fetch a large model first
FINAL = (400, 401, 403, 404)  # that no server answers for as long as it starts
LAST_LINES, WIDTH = 12, 200  # of a server that has ended, which say why
LOOK = "from vllm.platforms import current_platform; print(current_platform.device_type)"


def command(python: str, model: str, port: int, rank: int, modules: Sequence[str], dtype: str = "auto") -> list[str]:
    """What starts a server on any device: adapters of a rank up to `rank` on `modules`, as transformers names them."""
    return [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"),
        *("--port", str(port), "--enable-lora", "--max-loras", str(SLOTS)),
        *("--max-lora-rank", str(next((r for r in RANKS if r >= rank), rank)), "--max-model-len", "-1"),
        *("--dtype", dtype, "--lora-target-modules", *modules),
    ]


class Started(Server):
    """A server in a process of its own, which ends with this object or process at the latest.

    Args:
        arguments: the command. environment: variables that it has where they are not set.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], port: int, timeout: float) -> None:
        key = secrets.token_hex(16)  # adapters can be loaded at run time: by no other user of this machine
        super().__init__(f"http://127.0.0.1:{port}", timeout, key)
        with tempfile.NamedTemporaryFile("wb", prefix="zopro-vllm-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self.process = subprocess.Popen(
                [sys.executable, keeper.__file__, log.name, *arguments],
                env={**QUIET, **environment, **os.environ, **ENVIRONMENT, VLLM_KEY: key},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for zopro, which stops it
            )
        self._end = weakref.finalize(self, _stop, os.getpid(), self.process, self.log)

    def stop(self) -> object:
        """End it and all that it started."""
        return self._end()

    def wait(self) -> None:
        """Until it answers. Raises InputError: it has ended, or does not answer in an hour."""
        until = time.monotonic() + START
        while True:
            try:
                return self.greet()
            except Failed as error:
                if error.status in FINAL or self.process.poll() is not None or time.monotonic() > until:
                    raise InputError(f"engine: vLLM must start, got {error}") from None
            time.sleep(0.5)

    def _text(self, *args: Any, **kwargs: Any) -> str:
        try:
            return super()._text(*args, **kwargs)
        except Failed:
            if self.process.poll() is None:
                raise
            lines = self.log.read_text("utf-8", "replace").splitlines() if self.log.exists() else []
            last = "\n".join(line[:WIDTH] for line in lines[-LAST_LINES:])
            raise Failed(f"it has ended; its last lines:\n{last}" if last else "it has ended") from None


def start(options: ModelOptions, modules: Sequence[str]) -> Started:
    """A server of `options.model` that answers. Raises InputError: there is no vLLM, or it does not start."""
    if launched() > 1:
        rule = "must be vllm:http://HOST:PORT for a run of several processes, which would start a server each"
        raise InputError(f"engine: {rule}, got 'vllm'. Start one as docs/serving.md says.")
    python = _python(options.vllm_python)
    with task("looking at vLLM"):
        on_cpu = _device(python) == "cpu"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = command(python, options.model, port, options.lora_r, modules, options.dtype)
    arguments += ["--uvicorn-log-level", "warning", *(ON_CPU if on_cpu else ())]
    arguments += ["--trust-remote-code"] * options.trust_remote_code
    arguments += shlex.split(options.vllm_flags)
    server = Started(arguments, ENVIRONMENT_ON_CPU if on_cpu else {}, port, options.engine_timeout)
    try:
        with task("starting vLLM"):
            server.wait()
    except BaseException:  # Ctrl-C too
        server.stop()
        raise
    return server


def _python(given: str) -> str:
    """The Python that has vLLM: the one that is named, the one beside the `vllm` command, or this one."""
    beside = shutil.which("vllm")
    found = given or (str(Path(beside).resolve().parent / "python") if beside else sys.executable)
    path = shutil.which(os.path.expanduser(found))
    if path is None:
        raise InputError(f"vllm_python: must be a Python that has vLLM, got {found!r}, which is no program.")
    return path


def _device(python: str) -> str:
    """What that vLLM computes on. Raises InputError: it cannot be imported."""
    asks = [python, "-c", LOOK]
    try:
        asked = subprocess.run(asks, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    except OSError as error:  # a text without #!, the program of another machine
        said, found = error.strerror, []
    else:
        said = (asked.stderr.strip().splitlines() or ["nothing"])[-1]
        found = [] if asked.returncode else asked.stdout.split()
    if not found:
        raise InputError(
            f"vllm_python: must be a Python that has vLLM, got {python!r}, which says {said!r}. Install vLLM into an "
            "environment of its own and name its Python: --vllm_python ENV/bin/python."
        )
    return found[-1]


def _stop(owner: int, process: subprocess.Popen[bytes], log: Path) -> None:
    if os.getpid() != owner:  # a fork, in which the object ends too
        return
    assert process.stdin is not None
    with suppress(OSError):  # it has ended
        process.stdin.write(b"\n")
        process.stdin.close()
    try:
        process.wait(keeper.GRACE + 5)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    log.unlink(missing_ok=True)
