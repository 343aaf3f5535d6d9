"""Distinct problems of one split, drawn by seed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Hashable
from typing import Any

from zopro.errors import InputError

SPLITS = ("train", "test")
TEST_SHARE = 0.2
PATIENCE = 20_000
"""Draws without a new problem after which there are taken to be no more."""

Problem = tuple[Hashable, dict[str, Any]]  # what makes it the same problem, and its row


def split_of(key: Hashable) -> str:
    """Train or test, by a digest of the problem alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "big") < TEST_SHARE * 2**64 else "train"


def distinct(
    draw: Callable[[random.Random], Problem], name: str, rows: int, split: str, seed: int
) -> list[dict[str, Any]]:
    """`rows` rows of different problems of a split.

    Raises `InputError`: an argument is out of range, or there are not so many problems.
    """
    if rows < 1:
        raise InputError(f"--rows: must be at least 1, got {rows}.")
    if split not in SPLITS:
        raise InputError(f"--split: must be train or test, got {split!r}.")
    rng = random.Random(f"{name}/{split}/{seed}")
    found: dict[Hashable, dict[str, Any]] = {}
    misses = 0
    while len(found) < rows:
        key, row = draw(rng)
        if key not in found and split_of(key) == split:
            found[key] = row
            misses = 0
        elif (misses := misses + 1) == PATIENCE:
            raise InputError(
                f"--rows: must be at most about {len(found)}, the different {split} problems of this kind, got {rows}. "
                "Ask for fewer, or for harder ones."
            )
    return list(found.values())
