"""Sizes of buckets."""

from __future__ import annotations

from zopro.engine.gpu.memory import bucket


def test_buckets_leave_at_most_a_third_idle() -> None:
    for least in (1, 64):
        sizes = [bucket(size, least) for size in range(1, 1000)]
        assert sizes == sorted(sizes) and len(set(sizes)) < 22
        assert all(size <= found <= max(least, 1.5 * size) for size, found in enumerate(sizes, 1))
