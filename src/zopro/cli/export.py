"""`zopro export`: a policy as a folder of its own, or as a repository on the Hub.

zopro export RUN --out my-adapter --push-to-hub me/my-adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from zopro.system.imports import importing
from zopro.system.progress import task


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="an ordinary PEFT adapter, or with --merged an ordinary model, with its card",
        description="Write a policy, its tokenizer and a model card to a folder, as PEFT or transformers load them.",
    )
    add_policy(command)
    command.add_argument("--out", metavar="DIR", required=True, help="new or empty folder to write")
    command.add_argument("--merged", action="store_true", help="merge the adapter into the base model's weights")
    command.add_argument("--gguf", action="store_true", help="also write the adapter for llama.cpp and Ollama")
    command.add_argument(
        "--push-to-hub", metavar="REPO", help="also upload the folder to the Hub as REPO; the token is HF_TOKEN's"
    )
    command.set_defaults(handler=run)
    return command


def add_policy(command: argparse.ArgumentParser) -> None:
    """The arguments that name a finished policy."""
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("--iteration", type=int, metavar="I", help="policy iteration (default: the newest)")


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the folder and upload it; what can be refused is refused before anything is loaded."""
    from zopro.loop.finished import check_export, check_new, find_policy
    from zopro.loop.hub import check_repository

    check_new(args.out)
    check_export(find_policy(args.run, args.iteration), args.merged, args.gguf)
    if args.push_to_hub is not None:
        check_repository(args.push_to_hub)

    with importing():
        from zopro.loop import export, hub

    with task("exporting"):
        written = export.export(args.run, args.out, iteration=args.iteration, merged=args.merged, gguf=args.gguf)
    text = f"{written['kind']} of iteration {written['iteration']} written to {written['out']}"
    if args.push_to_hub is not None:
        with task(f"uploading to {args.push_to_hub}"):
            written["url"] = hub.push(args.out, args.push_to_hub)
        text += f"\nuploaded to {written['url']}"
        if written["kind"] == "adapter" and Path(written["base"]).exists():
            text += "\nIts base is a folder of this machine, which others do not have: --merged uploads a whole model."
    return written, text
