"""Which key holds a method's learning rate, and what it is where that key is 0."""

from __future__ import annotations

PRESETS = {"default": 1e-4, "paper": 1.0}
"""Presets with their zeroth-order learning rates; the paper's is relative to |mu|."""
RATE_KEYS = {
    **dict.fromkeys(("rloo", "rloo-checkpointed", "grpo", "online-dpo"), "first_order_learning_rate"),
    "guided": "guided_learning_rate",
}
"""Of the methods whose key is not `learning_rate`."""


def rate_key(method: str) -> str:
    """Which key holds a method's learning rate.

    >>> rate_key("rloo"), rate_key("mezo")
    ('first_order_learning_rate', 'learning_rate')
    """
    return RATE_KEYS.get(method, "learning_rate")
