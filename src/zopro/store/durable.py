"""Files and folders that survive a crash at any moment: whole or not at all, and on the disk before they count.

A file or folder is written beside its place, flushed to the disk, then renamed; the rename is flushed too. A file that
only grows (metrics, journal) may end in a truncated line after a crash: `whole_lines` leaves it out, `fix_end` cuts it
off. Lines that need not be on the disk at once are there before the next file or folder appears. What a full disk raises
is told apart by `disk_full`, whichever library was writing.

    python -c "from pathlib import Path; from zopro.store.durable import write_text; write_text(Path('a.txt'), 'whole')"
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from zopro.errors import InputError, Stopped

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# safetensors, torch and pyarrow write in their own languages and raise errors of their own.
_DISK_FULL_TEXT = re.compile(
    r"no space left|os error (28|27|122)\b|file too large|quota exceeded|PytorchStreamWriter|unexpected pos \d+ vs"
    r"|(basic_ios|ios_base)::clear",
    re.IGNORECASE,
)


def plain(value: Any) -> Any:
    """`value` with the numbers that JSON does not have (NaN, infinity) as None.

    >>> plain({"reward": float("nan"), "steps": (1, 2.5)})
    {'reward': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_unflushed: set[Path] = set()


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that it is there whole or not at all. Raises OSError where the disk refuses.

    Where `path` is a link, it stays one, and what it points to is written.
    """
    place = Path(os.path.realpath(path))
    write_bytes(place, text.encode("utf-8"), _beside(place))


def _beside(place: Path) -> Path:
    """Where a file or folder is until it is whole: a name that is short enough, however long its own is."""
    return place.with_name(f".{place.name[-60:]}.partial")


def write_bytes(path: Path, content: bytes, beside: Path) -> None:
    """`write_text` of bytes, which are in the file `beside` until they are whole: each process needs one of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    _flush_lines()
    os.replace(beside, path)
    fsync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and disappears when it does not.

    Where `path` is a link, it stays one, and what it points to is replaced. Raises `InputError`: nothing can be made.
    """
    place = Path(os.path.realpath(path))
    beside = _beside(place)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise InputError(f"'{path}': must be a folder that can be written to, got '{error.strerror}'.") from error
    try:
        yield beside
        fsync_tree(beside)
        _flush_lines()
        shutil.rmtree(place, ignore_errors=True)
        os.replace(beside, place)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    fsync_folder(place.parent)


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written in `folder`, by it or the nearest one above it that is there; None where it can be.

    A link that leads nowhere is there, and nothing can be written in it.
    """
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())
        os.scandir(nearest).close()
    except OSError as error:
        return error.strerror
    return None if os.access(nearest, os.W_OK) else os.strerror(errno.EACCES)


def unwritable_at(path: Path) -> str | None:
    """Why nothing can be put at `path`, or where it leads if it is a link; None where it can be."""
    return unwritable(Path(os.path.realpath(path)).parent)


def fsync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, itself included, to the disk."""
    for path in folder.rglob("*"):
        _fsync(path)
    _fsync(folder)


def fsync_folder(folder: Path) -> None:
    """Flush a folder's entries (which names are in it) to the disk."""
    _fsync(folder)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)


def _flush_lines() -> None:
    while _unflushed:
        path = _unflushed.pop()
        if path.exists():
            _fsync(path)


def append_line(path: Path, line: str, flush: bool = True) -> None:
    """Append `line` to `path`; what a full disk took only in part is cut off again. Raises OSError where it refuses.

    It is on the disk when this returns, or without `flush` (which takes milliseconds) before the next file or folder
    that this module writes appears.
    """
    new = not path.exists()
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        data = memoryview((line + "\n").encode())
        try:
            while data:
                data = data[os.write(descriptor, data) :]
            if flush:
                os.fsync(descriptor)
            else:
                _unflushed.add(path)
        except OSError:
            with suppress(OSError):
                os.ftruncate(descriptor, size)
            raise
    finally:
        os.close(descriptor)
    if new:
        fsync_folder(path.parent)


def whole_lines(path: Path) -> list[bytes]:
    """The lines of a growing file without their ends. A last line without an end was truncated by a crash: left out."""
    return path.read_bytes().split(b"\n")[:-1]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises `InputError` where there is none: somebody has damaged or removed it."""
    return _objects(path, lambda: [(0, path.read_bytes())])[0]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON object in each whole line of a file that is not blank; raises as `read_json`."""
    return _objects(path, lambda: [(n, line) for n, line in enumerate(whole_lines(path), 1) if line.strip()])


def _objects(path: Path, read: Callable[[], list[tuple[int, bytes]]]) -> list[dict[str, Any]]:
    """`read`: the texts, each with the number of its line; 0: the text is the whole file."""
    values: list[dict[str, Any]] = []
    number = 0
    try:
        for number, text in read():  # noqa: B007  (the handler names it)
            values.append(json.loads(text.decode("utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"{error}"
        if isinstance(error, json.JSONDecodeError):
            reason = f"{error.msg} in line {number or error.lineno}"
        raise InputError(f"'{path}': must be there and be JSON, got {reason}. Restore it.") from error
    if not all(isinstance(value, dict) for value in values):
        raise InputError(f"'{path}': must hold JSON objects, got others. Restore it.")
    return values


def keep_lines(path: Path, count: int) -> None:
    """Cut `path` off after its first `count` lines, on the disk too."""
    size = sum(len(line) + 1 for line in whole_lines(path)[:count])
    if size < path.stat().st_size:
        with path.open("r+b") as stream:
            stream.truncate(size)
            os.fsync(stream.fileno())


def fix_end(path: Path) -> None:
    """Cut off a last line that a crash has truncated, so that the next one does not run into it."""
    if path.exists():
        keep_lines(path, len(whole_lines(path)))


@contextmanager
def stopped_by_full_disk(folder: Path, remedy: str) -> Iterator[None]:
    """Raise `Stopped` in place of what any library raises when the disk that `folder` is on is full."""
    try:
        yield
    except Exception as error:
        cause = disk_full(error)
        if cause is None:
            raise
        reason = str(cause).strip().splitlines()[0]
        free = shutil.disk_usage(folder).free / 1e6
        raise Stopped(
            f"the disk is full, or a quota or size limit is reached: {reason}. Free space on the file system of {folder} "
            f"({free:.0f} MB are free there now). Nothing finished is lost. {remedy}"
        ) from error


def disk_full(error: BaseException | None) -> BaseException | None:
    """The cause of `error` that says that a disk, a quota or a size limit is exhausted; None if there is none.

    >>> disk_full(OSError(28, "No space left on device")) is not None, disk_full(ValueError("x")) is not None
    (True, False)
    """
    while error is not None:
        known = isinstance(error, OSError) and error.errno in DISK_FULL
        # A config key "file too large" of ours would be an InputError: a ValueError.
        if known or (not isinstance(error, ValueError) and _DISK_FULL_TEXT.search(str(error))):
            return error
        error = error.__cause__ or error.__context__
    return None
