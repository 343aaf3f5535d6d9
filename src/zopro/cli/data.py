"""`zopro data`: verifiable problems as rows, to a file or to stdout.

zopro data countdown --numbers 3 --rows 1000 --out train.jsonl
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zopro.config.fields import check
from zopro.errors import InputError
from zopro.store.shown import several


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "data",
        help="verifiable problems, made on the spot: arithmetic and countdown",
        description="Write problems whose answers a program can check, one JSON object a line. The same seed gives the "
        "same rows; rows of the split test never stand in train.",
    )
    command.add_argument("kind", metavar="KIND", choices=("arithmetic", "countdown"), help="arithmetic or countdown")
    command.add_argument("--rows", type=int, required=True, metavar="N", help="problems, all different")
    command.add_argument("--split", default="train", help="train or test (default: train)")
    command.add_argument("--seed", type=int, default=0, help="seed of the drawing (default: 0)")
    command.add_argument("--out", metavar="FILE", help="new .jsonl file to write (default: stdout)")
    command.add_argument("--numbers", type=int, metavar="K", help="countdown: numbers of a problem, 2 to 6 (default: 3)")
    command.add_argument(
        "--difficulty",
        type=int,
        nargs="+",
        metavar="D",
        help="arithmetic: 1 sums and differences of two-digit numbers, 2 products with a digit, 3 products, 4 products "
        "with a sum or a difference (default: 1 2)",
    )
    command.set_defaults(handler=run)
    return command


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Make the rows and write them; the object for `--json` holds them where no file does."""
    from zopro.tasks.generated import KINDS

    own = {"arithmetic": ("difficulty", "difficulties"), "countdown": ("numbers", "numbers")}
    for kind, (option, _) in own.items():
        if kind != args.kind and getattr(args, option) is not None:
            raise InputError(f"--{option}: is an option of '{kind}', not of '{args.kind}'. Leave it out.")
    check(0 <= args.seed < 2**63, "--seed", "must not be negative, and less than 2^63", args.seed)
    out = None if args.out is None else new_rows(args.out)
    option, parameter = own[args.kind]
    value = getattr(args, option)
    rows = KINDS[args.kind](args.rows, args.split, args.seed, **({} if value is None else {parameter: value}))
    result = {"kind": args.kind, "split": args.split, "seed": args.seed, "rows": len(rows), "out": args.out}
    if out is None:
        return {**result, "data": rows}, _lines(rows)
    write_rows(out, rows)
    return result, f"{several(len(rows), 'row')} written to {out}"


def new_rows(name: str) -> Path:
    """Where `--out` says that rows go.

    Raises `InputError`: there is something already, it has another ending, or its folder cannot be written to.
    """
    from zopro.store.durable import unwritable_at

    out = Path(name)
    if out.exists() or os.path.splitext(name)[1] != ".jsonl":
        rule = "is there already" if out.exists() else "has another ending"
        raise InputError(f"--out: must be a new .jsonl file, got '{name}', which {rule}. Choose another.")
    if reason := unwritable_at(out):
        raise unwritten(out, reason)
    return out


def write_rows(out: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the file, whole or not at all."""
    from zopro.store.durable import disk_full, write_text

    try:
        write_text(out, _lines(rows) + "\n")
    except OSError as error:
        if disk_full(error):
            raise
        raise unwritten(out, error.strerror) from error


def unwritten(out: Path, reason: str | None) -> InputError:
    """For a file that cannot be written, `--out` of a command."""
    return InputError(f"--out: must be a file that can be written, got '{out}' ({reason}). Choose another.")


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
