"""Peak memory counts from where it is told to, in MB of 1e6 bytes."""

from __future__ import annotations

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
