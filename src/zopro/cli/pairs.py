"""`zopro pairs`: preference rows from the model's own answers, ranked by a reward.

zopro pairs CONFIG.yaml --reward rouge --num_generations 8 --out pairs.jsonl
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from zopro.cli.data import new_rows, write_rows
from zopro.config.arguments import add_configuration, configuration
from zopro.config.fields import check
from zopro.system.imports import importing


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "pairs",
        help="preference rows from the model's own answers, ranked by a reward",
        description="Sample num_generations answers to each prompt from the model that a run of CONFIG would begin with, "
        "and write the best and the worst by its rewards as a row of preferences. Every key of CONFIG can be given as "
        "--key value, which wins.",
    )
    command.add_argument("--out", metavar="FILE", required=True, help="new .jsonl file to write")
    command.add_argument("--rows", type=int, metavar="N", help="prompts to answer (default: all)")
    command.add_argument("--held-out", action="store_true", help="answer the held-out prompts, not the training rows")
    add_configuration(command, without=("output_dir",))
    command.set_defaults(handler=run)
    return command


def run(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Sample, rank and write; what can be refused is refused before anything is loaded."""
    from zopro.loop.beforehand import check_beforehand, check_own_pairs
    from zopro.store.rundir import followed
    from zopro.store.shown import several

    check(args.rows is None or args.rows > 0, "--rows", "must be at least 1", args.rows)
    count = args.rows or 0
    config = followed(replace(configuration(args), output_dir=""), Path(args.config).parent)
    out = new_rows(args.out)
    check_own_pairs(config, count)
    check_beforehand(config)

    with importing():
        from zopro.loop.own_pairs import own_pairs

    rows, found = own_pairs(config, count, args.held_out)
    write_rows(out, rows)
    rewards = f"{found['chosen_reward']:.3f} and {found['rejected_reward']:.3f}"
    counted = f"{several(found['pairs'], 'pair')} of {several(found['prompts'], 'prompt')}"
    text = f"{counted} written to {out}: rewards {rewards} on average"
    if equal := found["prompts"] - found["pairs"]:
        text += f"\n{equal} prompt{'s have' if equal > 1 else ' has'} none: no two of their answers differ in reward"
    if cut := found["cut_off"]:
        text += (
            f"\n{cut} of the pairs {'have' if cut > 1 else 'has'} an answer that is cut off at max_completion_length: "
            f"{config.max_completion_length}. A run of this length does not learn from them: sample with a larger one"
        )
    return {**found, "out": str(out)}, text
