"""Rows from files, folders and the Hub, each row knowing where it stands.

Local JSON and CSV are read here rather than through `datasets`: it neither names the broken row nor keeps a null apart
from a missing column, and it writes a second copy of the data to its cache.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zopro.errors import InputError
from zopro.tasks.folders import PREFIXES, Split, chosen, files_of
from zopro.tasks.hub import configurations
from zopro.tasks.literals import without_nulls

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class Row(dict[str, Any]):
    """One row: column -> value, with the `file` it stands in and its `number` there, from 1.

    read: the columns whose value was asked for by name, which tells what a format did not read.
    """

    def __init__(self, values: dict[str, Any], file: str, number: int) -> None:
        super().__init__(values)
        self.file = file
        self.number = number
        self.read: set[str] = set()

    def __getitem__(self, column: str) -> Any:
        self.read.add(column)
        return super().__getitem__(column)

    def get(self, column: str, default: Any = None) -> Any:
        self.read.add(column)
        return super().get(column, default)

    @property
    def place(self) -> str:
        return f"'{self.file}' row {self.number}"


def load_rows(source: str, split: Split = "train", say: Callable[[str], None] = lambda line: None) -> list[Row]:
    """All rows of `source` that belong to `split`.

    source: a .jsonl, .json, .csv (each also with .gz) or .parquet file; a folder, of which the files of one split are
    read (train, else the only one that begins so; for evaluation the first of test, validation, valid, dev, eval that
    exists, likewise); or a Hub data set id, with a configuration as in "openai/summarize_from_feedback:comparisons", of
    which the split of that name is read, else the first that begins so.
    say: takes a line about which of several splits is read.
    Raises `InputError` naming the file and row for data that is missing, empty or broken, or the files of a folder with
    several such splits, or with one split in two forms.
    """
    path = Path(source)
    if path.is_dir():
        rows = [row for file in files_of(path, split, say, _readable) for row in _read(file, split)]
    elif path.is_file():
        rows = list(_read(path, split))
    else:
        check_source(source, split)
        rows = _read_hub(source, split, say)
    if not rows:
        raise InputError(f"{split}_data: '{source}' has no rows. Give data with at least one row.")
    return rows


def check_source(source: str, split: Split = "train") -> None:
    """Raise `InputError` where `source` is neither on the disk nor can be a Hub id."""
    path = Path(source)
    if path.is_dir():
        files_of(path, split, lambda line: None, _readable)
    elif path.is_file():
        _reader_of(path, split)
    elif _readable(path) or not _HUB_ID.fullmatch(source) or _names_a_file(source):
        raise InputError(f"{split}_data: no such file, folder or Hub data set id: '{source}'.")


def _names_a_file(source: str) -> bool:
    """Whether what has the form of a Hub id is the path of a file that is not there."""
    folder, slash, _ = source.partition("/")
    return Path(folder).is_dir() if slash else "." in source.partition(":")[0]


def _readable(path: Path) -> bool:
    return _reader(path) is not None


def _reader(path: Path) -> Callable[[Path, bytes], Iterable[Row]] | None:
    name = path.name.lower().removesuffix(".gz")
    return next((read for suffix, read in _READERS.items() if name.endswith(suffix)), None)


def _reader_of(path: Path, split: Split) -> Callable[[Path, bytes], Iterable[Row]]:
    reader = _reader(path)
    if reader is None:
        kinds = ", ".join(_READERS)
        raise InputError(f"{split}_data: '{path}' must be one of {kinds} (text also with .gz), a folder or a Hub id.")
    return reader


def _read(path: Path, split: Split) -> Iterator[Row]:
    reader = _reader_of(path, split)
    try:
        data = path.read_bytes()
        yield from reader(path, gzip.decompress(data) if path.suffix.lower() == ".gz" else data)
    except _Broken as error:
        raise InputError(f"{split}_data: '{path}' {error}.") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{split}_data: '{path}' cannot be read: {_line(error)}.") from None


class _Broken(Exception):
    """What is wrong in a file, and where."""


def _read_jsonl(path: Path, data: bytes) -> Iterator[Row]:
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield _row(_parse(line, f"row {number} "), path, number)


def _read_json(path: Path, data: bytes) -> Iterator[Row]:
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.lstrip().startswith(b"["):  # JSON lines under the name .json, as SHP has them
        yield from _read_jsonl(path, data)
        return
    for number, values in enumerate(_parse(data, ""), 1):
        yield _row(values, path, number)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"is not UTF-8 (byte {error.start + 1}): save the file as UTF-8 without compression, or with .gz in its name"


def _line_number(data: bytes, error: UnicodeDecodeError) -> int:
    return data.count(b"\n", 0, error.start) + 1


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        at = where or f"line {_line_number(data, error)} "
        raise _Broken(f"{at}{_not_utf8(error)}") from None
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} " if not where else ""
        remedy = ": write each row in one line, as one object in double quotes" if where else ""
        raise _Broken(f"{where}is not JSON ({error.msg}, {at}column {error.colno}){remedy}") from None
    except (RecursionError, ValueError) as error:  # nested too deeply, an integer of thousands of digits
        raise _Broken(f"{where}is not JSON that can be read ({_line(error)})") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("two values under one name")
    return values


def _row(values: Any, path: Path, number: int) -> Row:
    if not isinstance(values, dict):
        remedy = ": give a file that is one list the end .json" if isinstance(values, list) and number == 1 else ""
        raise _Broken(f"row {number} must be an object with columns, got {type(values).__name__}{remedy}")
    return Row(values, str(path), number)


def _read_csv(path: Path, data: bytes) -> Iterator[Row]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Broken(f"line {_line_number(data, error)} {_not_utf8(error)}") from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    number, limit = 0, csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        if reader.fieldnames == []:
            raise _Broken("begins with a blank line, where the header is due")
        if len(set(reader.fieldnames or ())) < len(reader.fieldnames or ()):
            raise _Broken("has two columns of one name")
        for number, values in enumerate(reader, 1):
            # DictReader files surplus fields under None and gives missing ones the value None.
            if None in values or None in values.values():
                width = len(reader.fieldnames or ())
                where = f"row {number} (line {reader.line_num})"
                raise _Broken(
                    f"{where} does not have the header's {width} field{'s' * (width != 1)}: part fields by commas, and "
                    "quote one that has a comma in it"
                )
            yield Row(values, str(path), number)
    except csv.Error as error:
        raise _Broken(f"row {number + 1} is not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, data: bytes) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _Broken(f"is not Parquet ({_line(error)})") from None
    try:
        rows = table.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError):
        rows = (_parquet_row(table, number) for number in range(table.num_rows))  # slower, but it names the row
    for number, values in enumerate(rows, 1):
        yield _arrow_row(values, str(path), number)


def _arrow_row(values: Mapping[str, Any], source: str, number: int) -> Row:
    """A row without the keys, inside of records, that only other rows of the column have: Arrow gives them null.

    A template would take them for given. Null in a record itself (a message's content) is kept, for its reader to see.
    """
    return Row({name: _map_records(without_nulls, value) for name, value in values.items()}, source, number)


def _map_records(change: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list):
        return [_map_records(change, entry) for entry in value]
    return {key: change(entry) for key, entry in value.items()} if isinstance(value, dict) else value


def _parquet_row(table: Any, index: int) -> dict[str, Any]:
    import pyarrow

    try:
        (values,) = table.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise _Broken(f"row {index + 1} is not UTF-8 (byte {error.start + 1} of a text)") from None
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        raise _Broken(f"row {index + 1} cannot be read ({_line(error)})") from None
    return dict(values)


_READERS: dict[str, Callable[[Path, bytes], Iterable[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _read_hub(source: str, split: Split, say: Callable[[str], None]) -> list[Row]:
    import datasets

    name, _, config = source.partition(":")
    try:
        splits = datasets.get_dataset_split_names(name, config or None)
        for prefix in PREFIXES[split]:
            if not (found := [s for s in splits if s.startswith(prefix)]):
                continue
            data = datasets.load_dataset(name, config or None, split=chosen(found, prefix, split, say))
            return [_arrow_row(values, source, number) for number, values in enumerate(data, 1)]
    except Exception as error:  # the library raises many kinds, from offline to a missing configuration
        if not config and (names := configurations(name, error)):
            rule = f"must name one of the data set's configurations, {names[0]}, got '{source}'"
            raise InputError(f"{split}_data: {rule}. Write it after a colon, {source}:{names[1]}.") from None
        raise InputError(
            f"{split}_data: '{source}' is neither a local file or folder nor a Hub data set that loads "
            f"({type(error).__name__}: {_line(error)})."
        ) from error
    raise InputError(f"{split}_data: Hub data set '{source}' has no {split} split, only {', '.join(splits)}.")


def _line(error: BaseException) -> str:
    """The first line of an error's text, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
