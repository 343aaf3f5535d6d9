"""Methods side by side on the same work: SFT policy, reward model, prompts, batch, rollout engine and evaluation.

Every method first searches its learning rate (same number of rates and steps for each), then trains from the same policy
with several seeds. Each training is a process of its own, so that its memory is its own; evaluation comes after the
training, outside its seconds and its memory. What is finished is kept, so a stopped comparison goes on, and methods
or seeds can be added to one.

    zopro compare CONFIG.yaml --methods guided,rloo --seeds 2 --steps 40
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zopro.compare.plan import Plan

if TYPE_CHECKING:
    from zopro.compare.run import compare

__all__ = ["Plan", "compare"]


def __getattr__(name: str) -> Any:
    if name != "compare":  # with all libraries, which a plan that is refused needs not wait for
        raise AttributeError(f"module 'zopro.compare' has no attribute {name!r}")
    from zopro.compare.run import compare

    return compare
