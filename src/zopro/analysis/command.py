"""`zopro analyse`: what can be typed, what it does, and how its numbers read on a terminal.

zopro analyse runs/mine
zopro analyse --policy their/policy --reward their/reward --out comparison
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zopro.analysis.reading.places import folder_at, refuse_parts_of_run, run_at
from zopro.errors import InputError, nearest, pip_install
from zopro.store.durable import unwritable
from zopro.store.layout import Layout
from zopro.store.shown import several
from zopro.system.imports import importing
from zopro.system.progress import task
from zopro.system.terminal import Page, Table

log = logging.getLogger(__name__)

PROJECTIONS = ("pca", "tsne", "umap")
OUT = "analysis"  # the folder for two folders of checkpoints, unless another is chosen
DESCRIPTION = """How policy and reward model moved: angles, correlations and distances between their updates, exact in
weight space, with what random directions would give; trajectories by PCA, t-SNE and UMAP. Writes analysis.json,
report.html, figures/ (PNG and SVG) and, of a run, share.png."""


def add(commands: Any) -> argparse.ArgumentParser:
    """Register the command."""
    command: argparse.ArgumentParser = commands.add_parser(
        "analyse",
        aliases=["analyze"],
        help="metrics and an interactive report of policy and reward trajectories",
        description=DESCRIPTION,
        epilog="Examples: 'zopro analyse runs/mine'; 'zopro analyse --policy a/checkpoints --reward b/checkpoints "
        "--out analysis'. docs/interplay.md says what each number means.",
    )
    command.add_argument("run", metavar="RUN", nargs="?", help="run directory of zopro")
    command.add_argument(
        "--policy",
        metavar="FOLDER",
        help="instead of RUN: a folder of checkpoints (adapters or models, ours or others', as safetensors), in the "
        "natural order of their names",
    )
    command.add_argument("--reward", metavar="FOLDER", help="optional: the reward model's; i-th update against i-th")
    command.add_argument("--out", metavar="DIR", help=f"where to write (default: RUN, or '{OUT}' with --policy)")
    command.add_argument(
        "--projections",
        metavar="LIST",
        default="",
        help="of pca, tsne and umap, comma separated (default: those installed; tsne and umap are the extra projections)",
    )
    command.add_argument(
        "--reward-ema",
        type=float,
        default=1.0,
        metavar="W",
        help="the reward checkpoints are moving averages, w * new + (1 - w) * before: analyse them without (default: 1)",
    )
    command.add_argument(
        "--coordinates",
        type=int,
        metavar="N",
        default=10_000,
        help="coordinates sampled for the distance correlation, the one metric that is not exact (default: 10000)",
    )
    command.add_argument("--seed", type=int, default=0, help="of sample, intervals, t-SNE and UMAP (default: 0)")
    command.set_defaults(handler=handle)
    return command


def handle(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Read, compute, write; returns the object of `--json` and the text."""
    _check(args)
    projections = _projections(args.projections)
    with importing():
        from zopro.analysis import write
        from zopro.analysis.analyse import analyse
        from zopro.analysis.reading.checkpoints import Trajectory, of_folder, of_run

    if args.run is not None:
        out = Path(args.out or args.run)
        sides = of_run(Path(args.run))
    else:
        out = Path(args.out or OUT)
        reward = of_folder(args.reward, "reward") if args.reward else Trajectory("reward", [])
        sides = of_folder(args.policy, "policy"), reward
        _say_unpaired(*(len(side.checkpoints) - 1 for side in sides))
    with task("comparing checkpoints"):
        numbers = analyse(
            *sides,
            coordinates=args.coordinates,
            reward_ema=args.reward_ema,
            projections=projections,
            seed=args.seed,
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, PermissionError) as error:  # in /proc, or a link to nothing
        raise _not_writable(out, error.strerror) from None
    with task("writing report and figures"):
        written = write.everything(out, numbers, source=None if args.run is None else Path(args.run))
    return {**numbers, **written}, Page(*_text(numbers, written))


def _check(args: argparse.Namespace) -> None:
    if args.run is not None and (args.policy or args.reward):
        raise InputError("RUN: must not be given together with --policy or --reward.")
    if args.run is None and not args.policy:
        raise InputError("RUN: must be given, or --policy. See 'zopro analyse --help'.")
    if args.coordinates < 2:
        raise InputError(f"--coordinates: must be at least 2, got {args.coordinates}.")
    if not 0 < args.reward_ema <= 1:
        raise InputError(f"--reward-ema: must lie in (0, 1], got {args.reward_ema}.")
    for name in ("policy", "reward"):
        if folder := getattr(args, name):
            folder_at(folder, name)
    if args.policy and args.reward:
        refuse_parts_of_run(args.policy, args.reward)
    if args.run is not None:
        run_at(Path(args.run))
    _check_out(args.out, args.run)
    if not 0 <= args.seed < 2**32:  # as t-SNE and UMAP take it
        raise InputError(f"--seed: must lie in [0, 2^32), got {args.seed}.")


def _say_unpaired(policy: int, reward: int) -> None:
    """Two trainers may have saved at different steps, which only their user knows."""
    if reward >= 0 and policy != reward:
        more = "--policy" if policy > reward else "--reward"
        log.warning(
            "--reward: has %s where --policy has %s. The i-th is compared with the i-th, and the last of %s with none; "
            "move away what has no counterpart.",
            several(reward, "update"),
            several(policy, "update"),
            more,
        )


def _check_out(chosen: str | None, run: str | None) -> None:
    out = Path(chosen or run or OUT)
    if out.is_file():
        raise InputError(f"--out: must be a folder, got the file '{out}'.")
    if reason := unwritable(out):
        raise _not_writable(out, reason)
    if Layout(out).config().exists() and (run is None or out.resolve() != Path(run).resolve()):
        raise InputError(f"--out: must not be another run, whose report it would replace, got '{out}'. Choose another.")


def _not_writable(out: Path, reason: str | None) -> InputError:
    return InputError(f"--out: must be a folder that can be written to, got '{out}' ({reason}). Choose another.")


def _projections(words: str) -> list[str]:
    chosen = [word.strip().lower() for word in words.split(",") if word.strip()]
    for word in chosen:
        if word not in PROJECTIONS:
            raise InputError(
                f"--projections: must be of {', '.join(PROJECTIONS)}, got '{word}'.{nearest(word, PROJECTIONS)}"
            )
    from zopro.analysis.numbers.projection import PACKAGES, available

    installed = available()
    for word in chosen:
        if word not in installed:
            raise InputError(f"--projections: '{word}' needs {PACKAGES[word]}. Install it: {pip_install('projections')}")
    return [word for word in PROJECTIONS if word in (chosen or installed)]


def _text(numbers: dict[str, Any], written: dict[str, str]) -> Iterator[str | Table]:
    """A table for each view, each value with the band of random directions; numbers as in the report."""
    from zopro.analysis.numbers.summary import PROCRUSTES
    from zopro.analysis.page.figures import band_of, decimals, short, span
    from zopro.analysis.page.findings import findings

    def chance(name: str, digits: int | None = None) -> str:
        return span(band_of(numbers, name, view), digits) or short(None)

    names = [
        "update_angle_degrees",
        "velocity_angle_degrees",
        "update_pearson",
        "update_distance_correlation",
        "policy_momentum_cosine",
        "reward_momentum_cosine",
        "policy_extrapolation_error",
        "reward_extrapolation_error",
    ]
    for view in numbers["views"]:
        yield f"{view} ({numbers['dimension'][view]:,} coordinates in {several(numbers['tensors'], 'weight')})"
        iterations = numbers["iterations"]
        rows = [("iteration", *map(str, iterations), "by chance (95 %), last")]
        for name in names:
            values, digits = numbers["metrics"][name][view], decimals(numbers, name, view)
            if numbers["reward"] or any(value is not None for value in values):
                cells = [short(value, digits) for value in values]
                rows.append((name, *cells, chance(name, digits)))
        if numbers["reward"]:
            value = numbers["metrics"][PROCRUSTES][view]
            rows.append((PROCRUSTES, short(value), *[""] * (len(iterations) - 1), chance(PROCRUSTES)))
        if len(rows) > 1:
            yield Table(rows, right=True)
        yield ""
    for kind, lacking in numbers["left_out"].items():
        more = " ..." if len(lacking) > 3 else ""
        count = several(len(lacking), "tensor")
        yield f"not compared, only in the {kind}: {count} ({', '.join(lacking[:3])}{more})"
    yield findings(numbers)
    yield f"report       {written['report']}"
