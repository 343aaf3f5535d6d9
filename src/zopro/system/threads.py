"""How many threads torch computes with: in what order a sum is taken depends on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def torch_threads(number: int | None = None) -> Iterator[None]:
    """`number` threads (by default as many as there are), and afterwards as many as before, whatever has changed them.

    numba does, which UMAP uses: its OpenMP layer sets the number of the whole process the first time it runs.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
