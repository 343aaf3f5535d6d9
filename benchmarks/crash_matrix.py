"""Kills the demo's run at random moments, fills its disk at others, resumes, and compares with a run left alone.

Every trial is a crash: a run starts, crashes, is resumed with `zopro run ... --resume`, and must end with the same
adapters (sha256), the same samples, pairs, evaluations and journals line by line, and every step logged once. Moments are
drawn by --seed, one in each of equal slices of the undisturbed run's time, and a run crashes when it is as far as that
one was at the moment, so that all stages are met; with --at it is killed as soon as it has made a file. With
--crashes-per-run a run crashes more than once before it ends; a difference then fails all its trials. Runs are forked
from this process, which saves importing the libraries for each.

A full disk is a small tmpfs that is filled up while the run goes on (root only). Elsewhere, and with `--disk limit`, the
kernel's limit on the size of files is set to nothing for the running process, which fails the same writes.

    python benchmarks/crash_matrix.py --kills 50 --full-disks 10
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from forked_run import Run

from zopro.demo import SETTINGS
from zopro.store.durable import whole_lines
from zopro.store.layout import Layout

SIZES: dict[str, dict[str, Any]] = {
    "demo": {"pretraining": 450, "rows": 2000, "test_rows": 200, "run": {"iterations": 3}},
    "reduced": {
        "pretraining": 200, "rows": 600, "test_rows": 60,
        "run": {"iterations": 2, "sft_steps": 25, "reward_steps": 50, "policy_steps": 25, "eval_prompts": 60},
    },
    "tiny": {
        "pretraining": 10, "rows": 80, "test_rows": 8,
        "run": {
            "iterations": 2, "sft_steps": 6, "sft_batch_size": 4, "reward_steps": 6, "reward_batch_size": 4,
            "policy_steps": 6, "refine_steps": 4, "prompts_per_step": 2, "pair_prompts": 8, "eval_prompts": 8,
            "checkpoint_steps": 2,
        },
    },
}  # fmt: skip
DISK_MB = 256


@dataclass(frozen=True)
class Trial:
    """One run that was disturbed and resumed."""

    kind: str  # killed or disk full
    moment: float  # seconds of the undisturbed run's time; of a path's, after the start
    crashed_in: str
    code: int  # exit code of the disturbed run
    line: str  # what it said last
    resumed: int  # exit code of the run in the end
    seconds: float  # from resuming it to the next crash or the end
    adapters: bool  # same sha256
    lines: bool  # same samples, pairs, evaluations and journals; every step logged once

    @property
    def passed(self) -> bool:
        ended = self.code == -signal.SIGKILL if self.kind == "killed" else self.code == 1 and "disk is full" in self.line
        return ended and self.resumed == 0 and self.adapters and self.lines


def make_inputs(folder: Path, size: str, options: list[str]) -> Path:
    """The demo's data and base model under `folder`; returns the configuration's path."""
    from zopro.demo import model, task
    from zopro.store.rundir import read_rows

    chosen = SIZES[size]
    train, test = task.write(folder, 0, train_rows=chosen["rows"], test_rows=chosen["test_rows"])
    conversations = [(row["prompt"], row[key]) for row in read_rows(train) for key in ("chosen", "rejected")]
    model.write(folder / "model", 0, conversations, steps=chosen["pretraining"])
    files = {"model": str(folder / "model"), "train_data": str(train), "eval_data": str(test)}
    given = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({**SETTINGS, **chosen["run"], **files, **given}), encoding="utf-8")
    return config


def in_a_child(work: Callable[[], object]) -> None:
    """Run `work` in a forked process, so that this one stays without threads of torch's and can be forked again."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"crash_matrix: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        raise SystemExit("crash_matrix: the inputs could not be made")


def fingerprint(run: Path) -> dict[str, Any]:
    """What must not depend on a crash: `adapters` (name -> sha256) and `lines` (name -> lines)."""
    patterns = ("iterations/*/*.jsonl", "evaluations/*.jsonl")
    adapters = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in run.rglob("*.safetensors")}
    lines = {str(p.relative_to(run)): p.read_bytes().splitlines() for name in patterns for p in run.glob(name)}
    steps = [(line["stage"], line["iteration"], line["step"]) for line in logged(run) if line["step"] is not None]
    return {"adapters": adapters, "lines": lines, "steps": steps}


def logged(run: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl."""
    path = Layout(run).metrics()
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def metrics(run: Path) -> list[str]:
    """Stage, iteration, step and event of each line of metrics.jsonl."""
    return [json.dumps([line.get(key) for key in ("stage", "iteration", "step", "event")]) for line in logged(run)]


def timeline(run: Path, began: float) -> list[tuple[float, str]]:
    """When a run that began at `began` (seconds since the epoch) wrote which line of metrics.jsonl."""
    times = [line["time"] - began for line in logged(run)]
    return list(zip(times, metrics(run), strict=True))


def where(run: Path) -> str:
    """The stage and step that a run crashed in, as far as its directory shows."""
    lines = logged(run)
    if not lines:
        return "start or sft" if Layout(run).config().exists() else "start"
    last = lines[-1]
    name = last["stage"] + ("" if last["iteration"] is None else f" {last['iteration']}")
    if last.get("event") == "end":
        return f"after {name}"
    checkpoints = [path.name for path in Layout(run).trainers().glob("*/checkpoint-*")]
    return f"{name} step {last['step']}" + (f" ({checkpoints[0]})" if checkpoints else "") if last["step"] else name


class Disk:
    """Where the runs of full disks live."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
        tried = subprocess.run(mount, capture_output=True, check=False) if kind == "tmpfs" and os.geteuid() == 0 else None
        self.mounted = tried is not None and tried.returncode == 0

    @property
    def kind(self) -> str:
        return f"tmpfs of {DISK_MB} MB, filled" if self.mounted else "limit on the size of files"

    def fill(self, pid: int) -> None:
        """Let every write of process `pid` fail."""
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
            return
        with (self.folder / "balloon").open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while True:
                stream.write(b"\0" * 2**12)

    def free(self) -> None:
        """End what `fill` did (a limit ends with its process)."""
        (self.folder / "balloon").unlink(missing_ok=True)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", str(self.folder)], check=False)


def disturb(
    kind: str, moments: list[float | str], config: Path, out: Path, disk: Disk, whole: dict[str, Any]
) -> list[Trial]:
    """Disturb one run at each of `moments`, resume it after each, and compare what it ends with.

    Args:
        moments: ascending seconds of the undisturbed run's time, each of which comes when this run is as far as that one
            was (the first earlier if the run has ended by then), or patterns of paths under `out`, each its end.

    Returns:
        One trial a crash: at least one, and fewer than `moments` if the resumed run ended before the next was due.
    """
    crashes: list[tuple[float, str, int, str]] = []
    lives: list[float] = []
    for moment in moments:
        while True:
            if not crashes:
                shutil.rmtree(out, ignore_errors=True)
            crashes_at = moment if isinstance(moment, str) else None
            run = Run(config, out, *(["--resume"] if crashes else []), crashes_at=crashes_at)
            if isinstance(moment, str) or run.running(_due(run, out, moment, whole["timeline"])):
                break
            code, line, seconds = run.end()
            if crashes:
                return _compared(kind, crashes, [*lives, seconds], (code, line), out, whole)
            moment *= 0.8
        if isinstance(moment, str):
            pass  # it kills itself
        elif kind == "killed":
            os.kill(run.pid, signal.SIGKILL)
        else:
            disk.fill(run.pid)
        code, line, seconds = run.end()
        if isinstance(moment, str) and code == 0:
            raise SystemExit(f"crash_matrix: the run ended without making '{moment}'")
        disk.free()
        lives.append(seconds)
        crashes.append((round(seconds if isinstance(moment, str) else moment, 2), where(out), code, line))
    code, line, seconds = Run(config, out, "--resume").end()
    return _compared(kind, crashes, [*lives, seconds], (code, line), out, whole)


def _due(run: Run, out: Path, moment: float, timeline: list[tuple[float, Any]]) -> Callable[[], bool]:
    """Whether a run is as far as the undisturbed one was at `moment`: by metrics.jsonl and the time since a line."""
    begun, line = max(((second, line) for second, line in timeline if second <= moment), default=(0.0, None))
    path, size, seen = Layout(out).metrics(), -1, run.seconds if line is None else math.inf

    def due() -> bool:
        nonlocal size, seen
        if seen == math.inf and path.exists() and path.stat().st_size != size:
            size = path.stat().st_size
            seen = run.seconds if line in metrics(out) else math.inf
        return run.seconds >= seen + moment - begun

    return due


def _compared(
    kind: str,
    crashes: list[tuple[float, str, int, str]],
    lives: list[float],
    end: tuple[int, str],
    out: Path,
    whole: dict[str, Any],
) -> list[Trial]:
    """The trials of one run, which ended with exit code and line `end`; its folder is removed if all passed."""
    found = fingerprint(out) if end[0] == 0 else dict.fromkeys(whole)
    same = {
        "adapters": found["adapters"] == whole["adapters"],
        "lines": found["lines"] == whole["lines"] and found["steps"] == whole["steps"],
    }
    trials = [
        Trial(kind, moment, crashed_in, code, line if end[0] == 0 else end[1], end[0], round(after, 1), **same)
        for (moment, crashed_in, code, line), after in zip(crashes, lives[1:], strict=True)
    ]
    if all(trial.passed for trial in trials):
        shutil.rmtree(out)
    return trials


def table(trials: list[Trial]) -> Iterator[str]:
    yield "| # | what | second | crashed in | resumed in (s) | adapters | lines | |"
    yield "|---|---|---|---|---|---|---|---|"
    for number, t in enumerate(trials, 1):
        same = ["same" if value else "DIFFER" for value in (t.adapters, t.lines)]
        verdict = "pass" if t.passed else f"FAIL {t.code} {t.resumed} {t.line}"
        yield f"| {number} | {t.kind} | {t.moment} | {t.crashed_in} | {t.seconds} | {same[0]} | {same[1]} | {verdict} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs (default: 50)")
    parser.add_argument(
        "--at", nargs="*", default=[], metavar="PATTERN", help="kill when the run has made such a path, once for each"
    )
    parser.add_argument("--crashes-per-run", type=int, default=1, help="crashes of one run (default: 1)")
    parser.add_argument("--full-disks", type=int, default=10, help="full disks (default: 10)")
    parser.add_argument("--disk", choices=["tmpfs", "limit"], default="tmpfs", help="how a disk is filled (see above)")
    parser.add_argument("--size", choices=SIZES, default="demo", help="of the run (default: demo)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="further configuration keys")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--work", type=Path, default=Path("runs/crash_matrix"), help="scratch folder, emptied first")
    parser.add_argument("--no-report", action="store_true", help="leave out report.html, slower than a tiny run")
    parser.add_argument("--json", type=Path, help="write the trials there too")
    args = parser.parse_args()

    from zopro.loop import pipeline

    gc.freeze()  # what was imported is no garbage: no fork need look
    if args.no_report:
        pipeline.write.refresh = pipeline.write.finish = lambda run: None
        pipeline.write.page = lambda run, summary: None

    work = args.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    in_a_child(lambda: make_inputs(work / "inputs", args.size, args.set))
    config = work / "inputs/config.yaml"
    began = time.time()
    code, line, seconds = Run(config, work / "whole").end()
    if code != 0:
        raise SystemExit(f"crash_matrix: the undisturbed run ended with {code}: {line}")
    whole = {**fingerprint(work / "whole"), "timeline": timeline(work / "whole", began)}
    print(f"undisturbed: {seconds:.1f} s, {len(whole['adapters'])} adapters", file=sys.stderr, flush=True)
    draw = random.Random(args.seed)
    trials: list[Trial] = []
    disk = Disk(work / "disk", args.disk)
    try:
        for kind, count in (("killed", args.kills), ("disk full", args.full_disks)):
            moments: list[float | str] = [seconds * (number + draw.random()) / count for number in range(count)]
            runs, size, at = -(-count // args.crashes_per_run), args.crashes_per_run, args.at if kind == "killed" else []
            plans: list[list[float | str]] = [at[first : first + size] for first in range(0, len(at), size)]
            for plan in [*plans, *(moments[number::runs] for number in range(runs))]:
                while plan:
                    out = (disk.folder if kind == "disk full" else work) / f"{kind.replace(' ', '_')}-{len(trials)}"
                    done = disturb(kind, plan, config, out, disk, whole)
                    trials, plan = [*trials, *done], plan[len(done) :]
                    print("\n".join(list(table(trials))[-len(done) :]), file=sys.stderr, flush=True)
    finally:
        disk.close()
    passed = sum(t.passed for t in trials)
    print("\n".join(table(trials)))
    print(f"\n{passed} of {len(trials)} passed; size {args.size}, undisturbed {seconds:.1f} s; disk: {disk.kind}")
    if args.json:
        args.json.write_text(json.dumps([asdict(t) for t in trials], indent=1), encoding="utf-8")
    return 0 if passed == len(trials) else 1


if __name__ == "__main__":
    raise SystemExit(main())
