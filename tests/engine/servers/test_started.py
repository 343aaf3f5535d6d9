"""A server that zopro starts: what it is told, that it is waited for, and that nothing of it stays behind."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from served_starts import Starts
from tiny import tiny_model, tiny_tokenizer
from zopro.config.model import ModelOptions
from zopro.engine.servers.vllm import hollow, keeper, started
from zopro.engine.servers.vllm.client import Failed
from zopro.errors import InputError

DOCS = Path(__file__).parents[3] / "docs" / "serving.md"
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Starts:
    return Starts(tmp_path / "python", monkeypatch)


def options(**given: Any) -> ModelOptions:
    return ModelOptions(**{"model": "base", "engine": "vllm", **given})


def test_users_are_told_to_start_what_zopro_starts() -> None:
    text = DOCS.read_text("utf-8")
    (told,) = re.findall(r"^    (VLLM_ALLOW.*?api_server(?:.*\\\n)+.*)$", text, re.MULTILINE)
    mine = started.command("python", "MODEL", 8000, 8, LLAMA)
    environment = [f"{name}={value}" for name, value in started.ENVIRONMENT.items()]
    assert shlex.split(told.replace("\\\n", "")) == [*environment, *mine]
    flags = [*started.ENVIRONMENT, *started.ENVIRONMENT_ON_CPU, *started.ON_CPU, *(a for a in mine if a[:2] == "--")]
    for name in flags:
        plain = name in ("--model", "--host", "--port")
        assert plain or re.search(rf"^\| `[^|]*{name}\b[^|]*` \| ", text, re.MULTILINE), name
    assert ", ".join(map(str, started.RANKS)) in text


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        ("all-linear", LLAMA),
        ("o_proj,down_proj", ["o_proj", "down_proj"]),
        ("embed_tokens", LLAMA),
        (r".*layers\.1\.(self_attn\.v|mlp\.gate)_proj", ["v_proj", "gate_proj"]),
    ],
)
def test_adapters_are_allowed_where_the_run_has_them_alone(targets: str, told: list[str]) -> None:
    """Elsewhere vLLM would multiply by zeros, which took most of a CPU's time."""
    assert hollow._modules(tiny_model("llama", tiny_tokenizer()), options(lora_target_modules=targets)) == told


def test_a_target_that_is_none_is_refused_before_a_server_starts(starts: Starts, tmp_path: Path) -> None:
    tiny_model("llama", tiny_tokenizer()).config.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match=r"lora_target_modules: must be .* got 'o_prj'.* There are: embed"):
        hollow.open_servers(options(model=str(tmp_path / "model"), lora_target_modules="o_prj"))
    assert not starts.notes.is_file()


def test_a_rank_takes_the_smallest_that_vllm_has() -> None:
    for rank, wanted in ((1, "1"), (4, "8"), (8, "8"), (33, "64"), (600, "600")):
        arguments = started.command("python", "m", 1, rank, ["o_proj"])
        assert arguments[arguments.index("--max-lora-rank") + 1] == wanted


def test_one_that_ends_is_quoted(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARD_LAST", "loading\nValueError: no such model")
    with pytest.raises(
        InputError, match=r"(?s)vLLM must start, got it has ended; its last lines:\nloading\nValueError: no such"
    ):
        started.start(options(), ["o_proj"])
    assert starts.gone()


def test_an_answer_that_a_starting_server_does_not_give_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another server's, say: flags may have given it another key or place."""

    def greet(server: started.Started) -> None:
        said.append(len(said))
        raise Failed("/v1/models says 401: Unauthorized", 401) if len(said) > 2 else Failed("refused")

    said: list[int] = []
    monkeypatch.setattr(started.Started, "greet", greet)
    server = started.Started([sys.executable, "-c", "import time; time.sleep(60)"], {}, 9, 5.0)
    with pytest.raises(InputError, match="vLLM must start, got /v1/models says 401"):
        server.wait()
    server.stop()
    assert len(said) == 3 and not server.log.exists()


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        ("--dtype 'half", r"vllm_flags: must be flags as a shell would read them, got .* \(No closing quotation\)"),
        ("--seed 3 --port 8000", "vllm_flags: must leave out --port: zopro would not find the server"),
        ("--api_key=x", "vllm_flags: must leave out --api-key"),
        ("--uds socket", "vllm_flags: must leave out --uds"),
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_is_started(flags: str, what: str) -> None:
    with pytest.raises(InputError, match=f"^{what}"):
        options(vllm_flags=flags)


def test_ctrl_c_ends_one_that_is_waited_for(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(server: started.Started) -> None:
        while not starts.notes.is_file():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(started.Started, "wait", pressed)
    with pytest.raises(KeyboardInterrupt):
        started.start(options(), ["o_proj"])
    assert starts.gone()


def test_nothing_outlives_a_zopro_that_is_killed(starts: Starts, tmp_path: Path) -> None:
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", "0"]
    (log := tmp_path / "log").touch()
    kept = [sys.executable, keeper.__file__, str(log), *server]
    parent = subprocess.Popen([sys.executable, "-c", PARENT, json.dumps(kept)], stdout=subprocess.PIPE)
    while not starts.notes.is_file() or not starts.notes.read_text().endswith("\n"):
        assert parent.poll() is None
    parent.send_signal(signal.SIGKILL)
    parent.communicate()
    assert starts.gone() and not log.exists()


PARENT = """
import json, subprocess, sys, time
kept = subprocess.Popen(json.loads(sys.argv[1]), stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


def test_one_that_dies_later_says_its_last_words(starts: Starts) -> None:
    server = started.Started([sys.executable, "-c", "print('out of memory', flush=True); input()"], {}, 9, 5.0)
    server.process.wait(20)
    with pytest.raises(Failed, match="it has ended; its last lines:\nout of memory"):
        server.load("a", Path("a"))
    log = server.log
    del server
    assert not log.exists()


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (
            {"vllm_python": "/no/python"},
            "vllm_python: must be a Python that has vLLM, got '/no/python', which is no",
        ),
        ({}, "vllm_python: must be a Python that has vLLM, got .*No module named 'vllm'.*--vllm_python ENV/bin/python"),
    ],
)
def test_a_python_without_vllm_is_refused(given: dict[str, str], what: str) -> None:
    with pytest.raises(InputError, match=what):
        started.start(options(**given), ["o_proj"])


@pytest.mark.parametrize(
    ("program", "says"),
    [("no first line\n", "Exec format error"), ("#!/no/python\n", "No such file"), ("#!/bin/sh\n", "nothing")],
)
def test_a_program_that_is_no_python_is_refused(program: str, says: str, tmp_path: Path) -> None:
    (python := tmp_path / "python").write_text(program)
    python.chmod(0o755)
    with pytest.raises(
        InputError, match=f"vllm_python: must be a Python that has vLLM, got '{python}', which says '{says}"
    ):
        started.start(options(vllm_python=str(python)), ["o_proj"])


def test_several_processes_would_start_one_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="engine: must be vllm:http://HOST:PORT for a run of several processes"):
        started.start(options(), ["o_proj"])
