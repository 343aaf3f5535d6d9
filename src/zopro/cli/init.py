"""`zopro init`: a configuration to begin with, and rows to try it on where none are given.

zopro init chat && zopro run chat.yaml
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
from importlib.resources import files
from pathlib import Path
from typing import Any

from zopro.choices import TASKS
from zopro.cli.data import unwritten
from zopro.config.template import SMALL_MODEL, template
from zopro.errors import InputError

PROBLEMS = 400  # rows of task verifiable, made on the spot
SHIPPED = ("chat", "preference", "verifiable")
"""Tasks that come with rows to try them on."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "init",
        help="write a commented configuration that runs as it is",
        description="Write TASK.yaml, and without --data a few rows beside it to try it on.",
    )
    command.add_argument("task", metavar="TASK", nargs="?", default="chat", help=f"{', '.join(TASKS)} (default: chat)")
    command.add_argument("--model", metavar="MODEL", help=f"a Hub id or a local folder (default: {SMALL_MODEL})")
    needed = " and ".join(task for task in TASKS if task not in SHIPPED)
    about = f"training rows: a file, a folder or a Hub id; must be given for {needed}"
    command.add_argument("--data", metavar="ROWS", help=about)
    command.add_argument("--out", metavar="FILE", help="the new file (default: TASK.yaml)")
    command.set_defaults(handler=run)
    return command


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the files; nothing is overwritten."""
    from zopro.config.model import check_there
    from zopro.store.durable import unwritable_at
    from zopro.tasks.rows import check_source

    if args.task not in list(TASKS):
        TASKS.check(args.task, "TASK")
        raise InputError(f"TASK: must be one of {', '.join(TASKS)}, got {args.task!r}. Copy a file of one of them.")
    if not args.data and args.task not in SHIPPED:
        raise InputError(f"--data: must be given for task {args.task}, got nothing. Give a file, a folder or a Hub id.")
    if args.model:
        check_there(args.model, "--model")
    if args.data:
        try:
            check_source(args.data)
        except InputError as error:
            raise InputError(f"--data: {str(error).removeprefix('train_data: ')}") from None
    out = args.out or f"{args.task}.yaml"
    if os.path.basename(out) in ("", ".", ".."):
        raise InputError(f"--out: must be a new file, got the folder '{out}'. Give a name in it.")
    config = Path(out)
    rows = None if args.data else config.with_name(f"{config.stem}-rows.jsonl")
    for path in filter(None, (config, rows)):
        if path.exists():
            raise InputError(f"--out: must be a new file, but '{path}' is there already. Choose another.")
    if reason := unwritable_at(config):
        raise unwritten(config, reason)
    _write(config, template(args.task, args.model or "", args.data or str(rows), str(config)), rows, args.task)
    written = {"config": str(config), "rows": None if rows is None else str(rows)}
    what = f"{config} written" + ("" if rows is None else f", and rows to try it on: {rows}")
    checked = args.task == "verifiable" and args.data  # by `maths`, which reads the rows' answers
    more = ", with a --reward that needs no answer if the rows have none" if checked else ""
    return written, f"{what}\nThen: zopro run {shlex.quote(str(config))}{more}"


def _write(config: Path, text: str, rows: Path | None, task: str) -> None:
    """Write both files or none."""
    from zopro.store.durable import disk_full, write_text

    try:
        if rows is not None:
            write_text(rows, _rows(task))
        write_text(config, text)
    except BaseException as error:
        if rows is not None:
            rows.unlink(missing_ok=True)
        if isinstance(error, OSError) and not disk_full(error):
            raise unwritten(config, error.strerror) from error
        raise


def _rows(task: str) -> str:
    if task != "verifiable":
        return files("zopro.tasks").joinpath("shipped/chat.jsonl").read_text(encoding="utf-8")
    from zopro.tasks.generated import KINDS

    return "".join(json.dumps(row) + "\n" for row in KINDS["arithmetic"](PROBLEMS, "train", 0))
