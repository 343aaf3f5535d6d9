"""Peak memory from one moment on: of the GPU where one is used, else of the process."""

from __future__ import annotations

from pathlib import Path

import torch

from zopro.session import peak_rss_mb

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Begins to watch when it is made.

    On Linux the kernel's high-water mark is set back, so that loading a model does not hide what follows; elsewhere
    the peak is that of the process's whole life.
    """

    def __init__(self) -> None:
        self._cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            return
        try:
            _CLEAR.write_text("5")  # proc(5): 5 resets the peak resident set size
            self._resettable = True
        except OSError:
            self._resettable = False

    def peak_mb(self) -> float:
        """The largest since then, in MB (1e6 bytes)."""
        if self._cuda:
            return torch.cuda.max_memory_allocated() / 1e6
        if self._resettable:
            for line in _STATUS.read_text(encoding="ascii").splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024 / 1e6
        return peak_rss_mb()
