"""`zopro compare`: what can be typed, and where it goes.

zopro compare CONFIG.yaml --methods guided,rloo --steps 40
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from zopro.compare.plan import Plan
from zopro.config import RunConfig
from zopro.config.arguments import add_configuration, configuration
from zopro.errors import InputError
from zopro.system.imports import importing


class _Renamed(argparse.Action):
    """An option by its old name, with a line that says the new one."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        print(f"zopro: {option} is called --{self.dest.replace('_', '-')} now", file=sys.stderr)
        setattr(namespace, self.dest, values)


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help="methods side by side on the same work: reward, KL, seconds and memory",
        description="Train every method from the same policy on the same work, measure it, and write tables and plots. "
        "Finished trainings are kept, so the same command goes on where it was stopped.",
    )
    plan = command.add_argument_group("Comparison")
    plan.add_argument("--methods", metavar="NAMES", required=True, help="comma separated, such as guided,rloo")
    plan.add_argument("--seeds", type=int, default=1, metavar="N", help="trainings of each method (default: 1)")
    length = plan.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=int, metavar="S", help="policy steps of each training")
    length.add_argument("--budget-minutes", type=float, metavar="M", help="minutes of each training")
    length.add_argument("--answers", type=int, metavar="N", help="answers that each training samples")
    plan.add_argument("--points", type=int, default=5, metavar="N", help="measurements along a training (default: 5)")
    plan.add_argument(
        "--search-trials",
        type=int,
        default=3,
        metavar="N",
        help="learning rates tried for each method, at most; 1: the configured one is taken (default: 3)",
    )
    plan.add_argument("--learning-rates", dest="search_trials", action=_Renamed, type=int, help=argparse.SUPPRESS)
    plan.add_argument(
        "--search-share", type=float, default=0.25, metavar="X", help="a trial's share of a training (default: 0.25)"
    )
    plan.add_argument("--start", default="sft", help="sft or iteration: what all start from (default: sft)")
    plan.add_argument(
        "--against",
        default="",
        metavar="METHOD",
        help="the method whose gain the others are compared with: ratios, and the time to 90 %% of it (default: rloo, "
        "if it is compared)",
    )
    plan.add_argument(
        "--out", metavar="DIR", help="folder of the comparison (default: CONFIG's output_dir, else a new one)"
    )
    add_configuration(command, without=("method", "iterations"), hidden=("output_dir", "eval_greedy"))
    command.set_defaults(handler=run)
    return command


def _configured(args: argparse.Namespace) -> RunConfig:
    """The configuration, with the folder that was typed; a run's own folder is not where its configuration compares."""
    from zopro.store.rundir import followed, is_run

    out, typed = args.out, getattr(args, "key.output_dir", "")
    if out and typed and Path(out) != Path(typed):
        raise InputError(f"--out: must be --output_dir where both are given, got '{out}' and '{typed}'. Give one.")
    config = followed(configuration(args, **({"output_dir": out} if out else {})), Path(args.config).parent)
    folders = Path(args.config).parent, Path(config.output_dir)
    of_run = any(map(is_run, folders))
    return replace(config, output_dir="") if of_run and not (out or typed) else config


def _planned(args: argparse.Namespace) -> Plan:
    """The plan, whose errors name the options."""
    for name in ("steps", "budget_minutes", "answers"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')}: must be greater than 0, got {value}.")
    try:
        return Plan(
            methods=tuple(name.strip() for name in args.methods.split(",") if name.strip()),
            seeds=args.seeds,
            steps=args.steps or 0,
            budget_minutes=args.budget_minutes or 0.0,
            answers=args.answers or 0,
            points=args.points,
            search_trials=args.search_trials,
            search_share=args.search_share,
            start=args.start,
            against=args.against,
        )
    except InputError as error:
        name, _, rest = str(error).partition(":")
        raise InputError(f"--{name.replace('_', '-')}:{rest}") from None


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Compare, and return the object of `--json` and the tables."""
    from zopro.compare.shared import SHARED_METHOD, shared_config
    from zopro.loop.beforehand import check_beforehand

    config, plan = _configured(args), _planned(args)
    if "key.eval_greedy" in vars(args):
        raise InputError("--eval_greedy: is a run's alone; a comparison measures sampled answers. Leave it out.")
    if plan.start == "sft" and "key.policy_steps" in vars(args):
        raise InputError("--policy_steps: must be given with --start iteration, which trains them. Leave it out.")
    for method in plan.methods:
        plan.steps_of(method, config)
    anew, out = replace(config, method=SHARED_METHOD), config.output_dir
    check_beforehand(shared_config(config, out, plan.start) if out else anew, resume=True)

    with importing():
        from zopro.compare import compare
        from zopro.compare.summary import text

    result = compare(config, plan)
    return result, text(result)
