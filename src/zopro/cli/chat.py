"""`zopro chat RUN`: the base model and the aligned policy answer the same messages, side by side.

Each remembers its own side of the conversation. Messages are lines of stdin, so a file of them works too:

    zopro chat RUN --temperature 0 < questions.txt
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from typing import Any, TextIO

from zopro.cli.export import add_policy
from zopro.errors import InputError
from zopro.system.imports import importing
from zopro.system.terminal import Page, Table, show
from zopro.text.degenerate import called

SPEAKERS = ("base", "aligned")
COMMANDS = "/reset forgets the conversation, /quit ends it"


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to the base model and the aligned policy side by side",
        description=f"Talk to the base model and the aligned policy, a line each time. {COMMANDS}.",
    )
    add_policy(command)
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: as in the run)")
    command.add_argument("--temperature", type=float, help="0 takes the likeliest token (default: as in the run)")
    command.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    command.set_defaults(handler=run)
    return command


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Answer until the messages end. The conversation is printed as it goes, or with `--json` the result."""
    from zopro.loop.finished import check_answering, check_text, find_policy

    check_answering(args.max_new_tokens, args.temperature or 0.0, args.seed)
    policy = find_policy(args.run, args.iteration)

    with importing():
        from zopro.loop.voices import Voices, manner_of, printable

    manner = manner_of(policy, args.max_new_tokens, args.temperature)
    print(f"loading {policy.config.model} and the policy of {policy.run}. Then: {COMMANDS}.", file=sys.stderr)
    voices = Voices(policy, held=len(SPEAKERS))
    for name in SPEAKERS:
        with voices.model(name):
            pass
    said: dict[str, list[dict[str, str]]] = {name: [] for name in SPEAKERS}
    turns: list[dict[str, str]] = []
    for message in _messages(sys.stderr if args.json or not args.stdout.isatty() else args.stdout):
        if message == "/quit":
            break
        if re.fullmatch(r"/\w*", message):  # others are paths, say, and are asked about
            known = message == "/reset"
            said = {name: [] for name in SPEAKERS} if known else said
            print("forgotten" if known else f"{printable(message)}: no such command. {COMMANDS}.", file=sys.stderr)
            continue
        asked = {name: [*said[name], {"role": "user", "content": message}] for name in SPEAKERS}
        try:
            check_text("prompt", message)
            seed = (args.seed + len(turns)) % 2**63
            turn = {name: voices.answer(name, [asked[name]], manner, seed)[0] for name in SPEAKERS}
        except InputError as error:  # of this message; the conversation stays as it was before it
            print(f"{error} {COMMANDS}.", file=sys.stderr)
            continue
        said = {name: [*asked[name], {"role": "assistant", "content": turn[name]}] for name in SPEAKERS}
        turns.append({"prompt": message, **turn})
        if not args.json:
            cells = {name: printable(turn[name]) for name in SPEAKERS}
            titles = {"base": "base", "aligned": called(turn["aligned"], policy.iteration, message)}
            with redirect_stdout(args.stdout):
                show(_page(message, cells, titles))
                sys.stdout.flush()
    return ({"run": str(policy.run), "iteration": policy.iteration, "turns": turns} if args.json else {}), ""


def _messages(asks: TextIO) -> Iterator[str]:
    """The lines of stdin that say something: typed one by one at a terminal, for which `asks` shows a prompt, or as they
    come."""
    if sys.stdin is None:  # closed
        return
    if isinstance(sys.stdin, io.TextIOWrapper):  # what is not UTF-8 is then refused as a message, and not as a whole
        sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from filter(None, (line.removeprefix("\ufeff").strip() for line in sys.stdin))  # BOM
        return
    with suppress(ImportError):
        import readline  # noqa: F401 - lines can then be edited and called back
    while True:
        try:
            with redirect_stdout(asks):
                line = input("> ").strip()
        except EOFError:
            return
        if line:
            yield line


def _page(message: str, cells: dict[str, str], titles: dict[str, str]) -> str:
    """A turn: columns at a terminal, which has shown the message already; else lines."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return Page(Table([tuple(titles[name] for name in SPEAKERS), tuple(cells[name] for name in SPEAKERS)]))
    return "\n".join([f"> {message}", *(f"{titles[name]}: {cells[name]}" for name in SPEAKERS), ""])
