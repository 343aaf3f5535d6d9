"""Attention on a GPU by kernels that take any shape.

On Hopper and Blackwell torch 2.11 and later prefer cuDNN's attention in half precision (where cuDNN is above 9.15). It is
planned anew for each shape, and every plan is kept. Others measured 55 ms and more for a plan, and here shapes hardly
repeat: prompts, answers and the rows that go together have other lengths in each step, and the plain decoding loop has
one column more for each token. FlashAttention, and the memory-efficient kernel where there is a mask, need no plan.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cuda

PLANNED = False  # True: as torch prefers (`benchmarks/gpu.py --only attention`)


@contextmanager
def of_any_shape(device: torch.device) -> Iterator[None]:
    """Within the context, passes on a GPU take no kernel that is planned for each shape; other devices have none.

    Not under autograd: what checkpoints run again outside of the context has to take the same kernel.
    """
    if device.type != "cuda" or PLANNED or torch.is_grad_enabled() or _chosen():
        yield
        return
    cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        cuda.enable_cudnn_sdp(True)


def _chosen() -> bool:
    """Whether somebody has chosen among the kernels."""
    others = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    return not (cuda.cudnn_sdp_enabled() and all(others))
