"""The caller's random state, untouched by libraries that reseed it.

transformers and TRL trainers call `set_seed` when they are built, which reseeds Python, numpy and torch. Anything that
builds or runs one inside `preserve_random_state()` leaves the caller's streams where they were:

    >>> import torch
    >>> _ = torch.manual_seed(7)
    >>> with preserve_random_state():
    ...     _ = torch.manual_seed(0)
    >>> bool(torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(7)))
    True
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the states of `random`, `numpy.random` and torch (CPU, every CUDA device and MPS) on leaving.

    Also when an exception leaves. Where CUDA is available this initialises it: a state that does not exist yet could
    not be put back.
    """
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            if mps is not None:
                torch.mps.set_rng_state(mps)


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one purpose, from the run's seed and the purpose's names: BLAKE2b, below 2^31 (numpy takes no more).

    >>> derived_seed(0, "sft") == derived_seed(0, "sft") != derived_seed(0, "policy", 1)
    True
    """
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "little") >> 1
