"""Peak memory counts from where it is told to, in MB of 1e6 bytes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trl import RLOOConfig

from tiny_trainers import adapted, online
from zopro import ZOPrOConfig, ZOPrOTrainer
from zopro.engine.local import engine
from zopro.system import heap, memory
from zopro.train import rloo
from zopro.train.guided import GuidedConfig, GuidedTrainer

MEASURED = """
import os, sys
import torch
from zopro.system.heap import expect_graph, return_freed_memory
from zopro.system.memory import PeakMemory, peak_rss_mb
device = torch.device("cpu")

def peaks():
    torch.ones(50_000_000)  # 200 MB, before
    memory = PeakMemory(device)
    before = memory.peak_mb()
    torch.ones(25_000_000)
    after, alone = memory.peak_mb(), peak_rss_mb()
    print("peaks", before, after, alone, PeakMemory(device).peak_mb(), flush=True)

def freed(what, *sizes):  # megabytes
    return_freed_memory()
    expect_graph(what == "graph")
    before = PeakMemory(device).peak_mb()
    for size in sizes:
        large, small = zip(*[(torch.ones(size * 250_000), torch.ones(5_000)) for _ in range(450 // 3 // size)])
        del large
    print(what, PeakMemory(device).peak_mb() - before, flush=True)

for job, *given in (peaks,), (freed, "passes", 31, 25, 19), (freed, "graph", 8, 4, 2):
    if not os.fork():
        job(*given)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def measured() -> dict[str, list[float]]:
    """Each in a process of its own: in this one, what other tests have left may be given back at any moment."""
    done = subprocess.run([sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    return {name: list(map(float, values)) for name, *values in lines}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark can be set back on Linux only")
def test_the_peak_is_that_since_the_moment(measured) -> None:
    before, after, alone, again = measured["peaks"]
    assert after - before == pytest.approx(100, abs=20)
    assert alone == pytest.approx(after, abs=1)
    assert again == pytest.approx(before, abs=20)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
@pytest.mark.parametrize("what", ["passes", "graph"])
def test_freed_tensors_go_back_to_the_system_though_small_ones_between_them_stay(what, measured) -> None:
    """Those above either threshold of heap.py."""
    (held,) = measured[what]
    assert held < 30, "of 450 MB, with 3 MB in use"


@pytest.mark.parametrize(
    ("trainer", "config", "checkpointing", "graphs"),
    [
        (rloo.EngineRLOOTrainer, RLOOConfig, True, 2),
        (rloo.EngineRLOOTrainer, RLOOConfig, False, 0),
        (ZOPrOTrainer, ZOPrOConfig, False, 0),
        (GuidedTrainer, GuidedConfig, False, 0),
    ],
)
def test_a_trainer_says_when_a_graph_is_kept(
    trainer: type, config: type, checkpointing: bool, graphs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where RLOO with checkpointed activations takes its loss, and no longer when it samples."""
    said: list[bool] = []
    for module in (rloo, engine):  # sampling is the engine's
        monkeypatch.setattr(module, "expect_graph", said.append)
    options: dict[str, Any] = {"model": adapted(), "beta": 0.1, "max_steps": 2, "gradient_checkpointing": checkpointing}
    online(trainer, config, tmp_path, options).train()
    assert said.count(True) == graphs and len(said) >= 4
    if graphs:
        assert said == [False, False, True] * 2, "sampling, the reference's log-probs, the loss"


def test_without_the_call_the_heap_is_left_alone() -> None:
    code = "import ctypes\nctypes.CDLL = None\nfrom zopro.system.heap import expect_graph\n"
    code += "expect_graph(True)\nexpect_graph(False)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_other_systems_say_what_they_do_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    assert 50 < memory.peak_rss_mb() < 1e6
    assert memory.how_measured() == "ru_maxrss, of the process's whole life"
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert heap.how_set().startswith("left as it is: no mallopt")
    heap.expect_graph(True)  # nothing happens
