"""Peak memory counts from where it is told to, in MB of 1e6 bytes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from zopro.memory import PeakMemory, peak_rss_mb


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's high-water mark can be set back on Linux only")
def test_the_peak_is_that_since_the_moment() -> None:
    device = torch.device("cpu")
    torch.ones(50_000_000)  # 200 MB, before
    memory = PeakMemory(device)
    before = memory.peak_mb()
    torch.ones(25_000_000)
    assert memory.peak_mb() - before == pytest.approx(100, abs=20)
    assert peak_rss_mb() == pytest.approx(memory.peak_mb(), abs=1)
    assert PeakMemory(device).peak_mb() == pytest.approx(before, abs=20)


FREED = """
import torch
from zopro.heap import return_freed_memory
from zopro.memory import PeakMemory, peak_rss_mb
return_freed_memory()
before = PeakMemory(torch.device("cpu")).peak_mb()
for size in (31, 25, 19):  # megabytes, above heap.py's threshold
    large, small = zip(*[(torch.ones(size * 250_000), torch.ones(5_000)) for _ in range(6)])
    del large
held = PeakMemory(torch.device("cpu")).peak_mb() - before
print(peak_rss_mb(), held)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_tensors_go_back_to_the_system_though_small_ones_between_them_stay() -> None:
    done = subprocess.run([sys.executable, "-c", FREED], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[1]) < 30, "of 450 MB, with a tenth of one in use"
