"""A run as an archive keeps it, in which nothing can be written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody may write to `folder` and what is in it."""
    modes = {path: path.stat().st_mode for path in (folder, *folder.rglob("*"))}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


def closed(folder: Path) -> list[str]:
    """What its owner may not write to, of `folder` and what is in it; root, who may, sees it too."""
    return [path.name for path in (folder, *folder.rglob("*")) if not path.stat().st_mode & 0o200]
