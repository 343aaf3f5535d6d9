"""Reading safetensors files: whole, one tensor, or a piece of one. A file that is missing or damaged is one clear line.

    read_whole(file), read_tensor(file, "model.norm.weight"), read_header(file)["model.norm.weight"].flat(0, 100)

Pieces are plain reads of byte ranges, so that memory is what was asked for and no more: `safetensors.safe_open` maps
files into memory, and mapped pages count as resident until the system takes them back, so a hundred mapped checkpoints
look like a hundred checkpoints in memory. The format is simple enough to read directly:
eight bytes with the header's length, the header as JSON (name -> dtype, shape, byte range), then the data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from zopro.errors import InputError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Names of the format's floating point types; other tensors (integer buffers) are no weights and are passed over."""

MAX_HEADER = 100_000_000  # bytes, the format's own limit


Damage = Callable[[Path, Exception], str]
"""What is said of a damaged file, from its path and from what safetensors or the system says."""


def damage(file: Path, error: Exception) -> str:
    return f"{file}: must be a whole safetensors file, got a damaged one ({error})."


@contextmanager
def _readable(file: Path, said: Damage) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise InputError(said(file, error)) from error


def read_whole(file: Path, said: Damage = damage) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU. Raises `InputError` with what is `said`: missing or damaged."""
    with _readable(file, said):
        tensors: dict[str, Tensor] = load_file(file)
    return tensors


def tensor_names(file: Path) -> list[str]:
    """Names of the tensors of a file; raises as `read_whole`."""
    with _readable(file, damage), safe_open(file, framework="pt") as stream:
        return list(stream.keys())


def read_tensor(file: Path, name: str) -> Tensor:
    """One tensor of a file, on the CPU; raises as `read_whole`."""
    with _readable(file, damage), safe_open(file, framework="pt") as stream:
        tensor: Tensor = stream.get_tensor(name)
    return tensor


@dataclass(frozen=True)
class Stored:
    """Where one tensor lies: its file, shape, dtype and first byte."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Columns of the tensor seen as [shape[0], -1]."""
        return self.numel // self.shape[0]

    def flat(self, first: int, last: int, out: Tensor | None = None) -> Tensor:
        """Elements [first, last) in row-major order, in the stored dtype; into `out` (one row, that dtype) if given."""
        return self._read([(first, last)], out)

    def columns(self, first: int, last: int) -> Tensor:
        """[shape[0], last - first]: the same columns of every row of the tensor seen as [shape[0], -1]."""
        rows, width = self.shape[0], self.width
        if (first, last) == (0, width):
            return self.flat(0, self.numel).view(rows, width)
        return self._read([(row * width + first, row * width + last) for row in range(rows)]).view(rows, last - first)

    def _read(self, ranges: list[tuple[int, int]], out: Tensor | None = None) -> Tensor:
        size = self.dtype.itemsize
        data = torch.empty(sum(last - first for first, last in ranges), dtype=self.dtype) if out is None else out
        buffer: Any = data.view(torch.uint8).numpy()
        view, at = memoryview(buffer), 0
        try:
            with self.path.open("rb", buffering=0) as stream:
                for first, last in ranges:
                    stream.seek(self.start + first * size)
                    end = at + (last - first) * size
                    while at < end:
                        count = stream.readinto(view[at:end])
                        if not count:
                            raise InputError(f"{self.path}: must be a whole safetensors file, got a truncated one.")
                        at += count
        except OSError as error:
            raise InputError(f"{self.path}: must be a readable file, got '{error.strerror}'.") from None
        return data


def read_rows(stored: Sequence[Stored], first: int, last: int, space: Tensor) -> Sequence[Tensor]:
    """Elements [first, last) of each: a tensor [len(stored), last - first] where their dtypes agree, else a list.

    Args:
        space: bytes, used again and again: new memory for every piece costs as much as reading it.
    """
    dtypes = {one.dtype for one in stored}
    if len(dtypes) > 1:
        return [one.flat(first, last) for one in stored]
    dtype, length = dtypes.pop(), last - first
    rows = space[: len(stored) * length * dtype.itemsize].view(dtype).view(len(stored), length)
    for one, row in zip(stored, rows, strict=True):
        one.flat(first, last, row)
    return rows  # type: ignore[return-value]


def read_header(path: Path) -> dict[str, Stored]:
    """The floating point tensors of a safetensors file, by name.

    Raises:
        InputError: there is no such file, it is no safetensors file, or it ends before its last tensor does.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise InputError(f"{path}: must be a whole safetensors file, got one of {size} bytes that ends too soon.")
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            needed = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except OSError as error:
        raise InputError(f"{path}: must be a readable file, got '{error.strerror}'.") from None
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path}: must be a safetensors file, got one whose header cannot be read.") from None
    if size < needed:
        raise InputError(f"{path}: must be a whole safetensors file of {needed} bytes, got {size}: it is truncated.")
    return {
        name: Stored(path, name, tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + entry["data_offsets"][0])
        for name, entry in entries.items()
        if entry["dtype"] in DTYPES and math.prod(entry["shape"])
    }
