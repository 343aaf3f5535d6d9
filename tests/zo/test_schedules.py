"""How the share of the previous update decays."""

from __future__ import annotations

import pytest

from zopro.zo import target_share


def test_target_share_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"total_steps: must be at least 1, got 0"):
        target_share(0, 0)
    with pytest.raises(ValueError, match=r"decay: must be 'linear' or 'exponential', got 'cosine'"):
        target_share(0, 5, "cosine")
    assert target_share(0, 1) == target_share(5, 1) == 0.999
