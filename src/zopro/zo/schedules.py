"""How the share of the previous update decays over an iteration's steps (paper, section 4)."""

from __future__ import annotations

INITIAL_SHARE = 1 - 1e-3  # d at the first step: d = 1 would add no noise (the paper)
FINAL_EXPONENTIAL_SHARE = 1e-3  # d at the last step of the exponential decay


def target_share(step: int, total_steps: int, decay: str = "linear") -> float:
    """Share d of the previous update at `step` (from 0) of `total_steps`: starts at 1 - 1e-3 and never grows.

    linear: 0 at the last step and beyond. exponential: 1e-3 there, whatever the number of steps (the paper).

    >>> target_share(0, 11), target_share(10, 11), target_share(99, 11)
    (0.999, 0.0, 0.0)
    """
    if total_steps < 1:
        raise ValueError(f"total_steps: must be at least 1, got {total_steps}")
    progress = min(1.0, step / (total_steps - 1)) if total_steps > 1 else 0.0
    if decay == "linear":
        return INITIAL_SHARE * (1 - progress)
    if decay == "exponential":
        share: float = INITIAL_SHARE * (FINAL_EXPONENTIAL_SHARE / INITIAL_SHARE) ** progress
        return share
    raise ValueError(f"decay: must be 'linear' or 'exponential', got {decay!r}")
