"""Peak memory in MB (1e6 bytes): of CUDA's allocator where a GPU is used, else the process's resident set."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

STATUS = Path("/proc/self/status")


class PeakMemory:
    """The peak from the moment this is made, so that loading a model does not hide what follows.

    Args:
        device: where the work is done.

    Without CUDA that needs Linux, whose kernel sets its high-water mark back; elsewhere the peak is that of the
    process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            import torch  # whoever has a device has it

            torch.cuda.reset_peak_memory_stats(device)
            return
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): 5 resets the peak resident set size

    def peak_mb(self) -> float:
        """The largest since then."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device) / 1e6
        return peak_rss_mb()


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, or since a `PeakMemory` was last made."""
    if found := _status_mb("VmHWM"):  # Linux: its ru_maxrss may be that of the process which started this one
        return found
    import resource  # here, so that only a call needs a POSIX system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def _status_mb(name: str) -> float:
    """A line of Linux's status of this process; 0 elsewhere."""
    with contextlib.suppress(OSError):
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e6
    return 0.0


def used_mb(device: torch.device) -> float:
    """Memory in use now: of CUDA's allocator, else what is resident of this process (off Linux: what was at most)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device) / 1e6
    return _status_mb("VmRSS") or peak_rss_mb()


@contextlib.contextmanager
def kept_for_backward(parameters: Iterable[torch.Tensor]) -> Iterator[Callable[[], float]]:
    """Inside, MB that graphs keep for their backward passes, other than `parameters`.

    >>> import torch
    >>> weight = torch.ones(250_000, requires_grad=True)  # 1 MB
    >>> with kept_for_backward([weight]) as kept_mb:
    ...     loss = (weight * torch.ones(250_000)).exp().sum()
    >>> kept_mb()  # the factor, and the result of exp
    2.0
    """
    import torch

    seen, total = {parameter.untyped_storage().data_ptr() for parameter in parameters}, 0.0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes() / 1e6
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield lambda: total


def how_measured() -> str:
    """Where `peak_rss_mb` comes from on this system, for the record."""
    return "VmHWM of /proc/self/status" if STATUS.exists() else "ru_maxrss, of the process's whole life"
