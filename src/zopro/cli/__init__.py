"""The `zopro` command: what can be typed, and where it goes. All work is done by the modules imported in the handlers.

Progress and messages go to stderr; stdout carries the result, with `--json` exactly one JSON object. Exit code 2 and
one line for bad input, 1 and one line for a full disk, 130 when interrupted.

    zopro demo
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from zopro import __version__
from zopro.analysis import command as analyse
from zopro.bench import command as bench
from zopro.cli import chat, data, export, init, listing, output, pairs
from zopro.cli.parser import Parser
from zopro.compare import command as compare
from zopro.config.arguments import add_configuration, configuration
from zopro.errors import InputError
from zopro.store.explained import explained
from zopro.system import progress
from zopro.system.heap import return_freed_memory
from zopro.system.imports import importing
from zopro.system.ranks import launched
from zopro.system.terminal import show

Result = tuple[dict[str, Any], str]
"""What a handler returns: the object for `--json`, and the text for people. Empty: another process has it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return its exit code."""
    output.opened()
    try:
        try:
            args = _parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # help, which ends the process
        _set_verbosity(args.verbose)
        return_freed_memory()
        # Libraries print to stdout as they like; the result must stay alone there.
        alone = "run --dry-run" if getattr(args, "dry_run", False) else args.command
        many = launched() > 1
        if alone != "run" and many:
            raise InputError(f"{alone}: must be started as one process; a launcher's many share zopro run only.")
        if many:
            # Libraries ask torch whether there is a GPU. That binds a process to the first one, before it is given its
            # own, unless torch asks NVML.
            os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        args.stdout = sys.stdout
        with contextlib.redirect_stdout(sys.stderr), progress.reporting():
            result, text = _handled(args)
        if result and args.json:
            output.as_json(result)
        elif result:
            show(text)
        sys.stdout.flush()
        return 0
    except Exception as error:
        unread = output.unread()
        output.drop()
        if isinstance(error, BrokenPipeError) and unread:  # whoever reads has enough, as `head` has
            return 141  # as a shell shows SIGPIPE
        known = explained(error)
        if known is None:
            raise
        code, line = known
        with contextlib.suppress(BrokenPipeError):  # the code says it still
            print(f"zopro: {line}", file=sys.stderr, flush=True)
        return code
    except KeyboardInterrupt:
        print("\nzopro: interrupted", file=sys.stderr)
        return 130


def _handled(args: argparse.Namespace) -> Result:
    """What the handler returns. Raises InputError where code of the user's would end the process as if all were done."""
    try:
        result: Result = args.handler(args)
    except SystemExit as error:
        raise InputError(
            f"{args.command}: code of yours must not end the process, got sys.exit({error.code!r})."
        ) from error
    return result


def _parser() -> argparse.ArgumentParser:
    about = "Align language models to preferences or rewards by function evaluations instead of gradients."
    parser = Parser(prog="zopro", description=about)
    parser.add_argument("--version", action="version", version=f"zopro {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    adders = (
        _add_demo,
        _add_run,
        _add_replay,
        compare.add,
        analyse.add,
        _add_generate,
        chat.add,
        export.add,
        bench.add,
    )
    for add in (init.add, *adders, data.add, pairs.add, listing.add_methods, listing.add_schema):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.add_argument("-v", "--verbose", action="store_true", help="let the libraries log and warn")
    return parser


def _add_demo(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="the whole loop on a tiny embedded model and task, offline",
        description="Run the whole loop on a tiny model and task that come with zopro: no download, no GPU. Ends with a "
        "table, answers before and after, and the path of the report.",
    )
    command.add_argument("--out", "--output_dir", metavar="DIR", help="run directory (default: a new one)")
    command.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    command.add_argument("--iterations", type=int, default=3, help="policy iterations (default: 3)")
    command.set_defaults(handler=_demo)
    return command


def _add_run(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "run",
        help="the whole loop on your model and data",
        description="Run the whole loop as CONFIG says. Every key of CONFIG can be given as --key value, which wins.",
    )
    command.add_argument(
        "--dry-run", action="store_true", help="say what it would do, minutes and memory by one timed step; write nothing"
    )
    command.add_argument("--resume", action="store_true", help="continue where the run stopped, to the same bits")
    command.add_argument("--live", action="store_true", help="keep the report up to date, as a page that reloads itself")
    add_configuration(command)
    command.set_defaults(handler=_run)
    return command


def _add_replay(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "replay",
        help="the policy of any zeroth-order step, rebuilt from its journal without a forward pass",
        description="Rebuild the policy after step S of a zeroth-order iteration, from the policy that the iteration "
        "started from and its journal. Needs no base model, no data and no forward pass.",
    )
    command.add_argument("run", metavar="RUN", help="run directory")
    command.add_argument("--iteration", type=int, metavar="I", help="policy iteration (default: newest with a journal)")
    command.add_argument("--to-step", type=int, metavar="S", help="steps to take, 0 to all (default: all)")
    command.add_argument("--out", metavar="DIR", required=True, help="new or empty folder to write")
    command.set_defaults(handler=_replay)
    return command


def _add_generate(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "generate",
        help="see what changed: answers of the base model, of what the run began with and of the aligned policy",
        description="Answer each TEXT by the base model, by what the run began with and by the aligned policy, side by "
        "side. A TEXT is one message of a user, in the model's chat template.",
    )
    export.add_policy(command)
    command.add_argument("--prompt", metavar="TEXT", nargs="+", action="extend", required=True, help="what to answer")
    command.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: as in the run)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default: 0)")
    command.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: 0)")
    command.set_defaults(handler=_generate)
    return command


def _demo(args: argparse.Namespace) -> Result:
    with importing():
        from zopro import demo

    summary = demo.run(args.out, seed=args.seed, iterations=args.iterations)
    return summary, demo.table(summary)


def _run(args: argparse.Namespace) -> Result:
    from zopro.loop.beforehand import check_beforehand, check_resumed, own_folder

    if args.dry_run and args.resume:
        raise InputError("--dry-run: must be given without --resume. Leave one of them out.")
    if args.dry_run and args.live:
        raise InputError("--dry-run: must be given without --live, for it writes no report. Leave one of them out.")
    moved = own_folder(args.config) if args.resume and "key.output_dir" not in vars(args) else {}
    config = configuration(args, **moved)
    check_beforehand(config, args.resume)
    if args.resume:
        check_resumed(config)

    if args.dry_run:
        with importing():
            from zopro.loop import estimate

        return estimate.dry_run(config)

    with importing():
        from zopro import demo
        from zopro.loop import pipeline

    summary = pipeline.run(config, resume=args.resume, live=args.live)
    return summary, demo.table(summary) if summary else ""


def _replay(args: argparse.Namespace) -> Result:
    from zopro.loop.finished import check_new, find_journal

    find_journal(args.run, args.iteration, args.to_step)
    check_new(args.out)

    with importing():
        from zopro.loop import replay

    with progress.task("replaying"):
        result = replay.replay(args.run, args.out, iteration=args.iteration, to_step=args.to_step)
    return result, replay.describe(result)


def _generate(args: argparse.Namespace) -> Result:
    from zopro.loop.finished import check_answering, check_text, find_policy

    for prompt in args.prompt:
        check_text("--prompt", prompt)
    check_answering(args.max_new_tokens, args.temperature, args.seed)
    find_policy(args.run, args.iteration)

    with importing():
        from zopro.loop import voices

    with progress.task("answering by each policy"):
        answers = voices.answer(
            args.run,
            args.prompt,
            iteration=args.iteration,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )
    return answers, voices.side_by_side(answers)


def _set_verbosity(verbose: bool) -> None:
    """Keep the libraries quiet unless asked; what `zopro` itself has to say always comes through, on stderr."""
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(stream=sys.stderr, level=level, format="zopro: %(levelname)s: %(message)s")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if verbose:
        return
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    for name in (
        "TRANSFORMERS_NO_ADVISORY_WARNINGS",
        "HF_DATASETS_DISABLE_PROGRESS_BARS",
        "HF_HUB_DISABLE_PROGRESS_BARS",
        "TRL_EXPERIMENTAL_SILENCE",
    ):
        os.environ.setdefault(name, "1")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("default", module=r"zopro(\.|$)")
