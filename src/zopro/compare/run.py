"""Carry out a plan: jobs in processes of their own, one after the other, then tables and plots."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from zopro.choices import METHODS
from zopro.compare.kept import SAMPLES, finished, result_of
from zopro.compare.page import write_page
from zopro.compare.plan import PROBE_STEPS, Job, Plan
from zopro.compare.plots import write_plots
from zopro.compare.shared import shared_config
from zopro.compare.state import state
from zopro.compare.summary import beside, markdown, method_summary, start_point
from zopro.config import RunConfig
from zopro.errors import InputError, Stopped
from zopro.loop.divergence import kl_per_answer
from zopro.loop.own import check_own
from zopro.loop.summary import reward_quality
from zopro.store.durable import plain
from zopro.store.layout import Layout
from zopro.store.lock import RunLock
from zopro.store.rundir import check_folder, is_run, read_metrics, write_text
from zopro.store.shown import PER_ANSWER, seconds, several
from zopro.system import progress
from zopro.system.parent import killed


class JobFailed(Stopped):
    """A job failed for a reason of its own, not by its input or the machine; the message is the last line it wrote."""


def compare(config: RunConfig, plan: Plan, *, quiet: bool = False) -> dict[str, Any]:
    """Compare the plan's methods and return what `config.output_dir`/compare.json says.

    Also written: compare.html (curves, memory, answers), compare.md (the table) and, in PNG and PDF, reward_seconds,
    reward_kl and memory. A method whose process fails is reported under `failed` and the others go on. Methods that an
    earlier call finished in the same folder, by the same plan but for methods and seeds, stay in the result.

    Raises:
        InputError: bad input, another process compares in that folder, or no method could be run.
        Stopped: the machine gave out (a full memory) before a method was through.
    """
    for method in plan.methods:
        plan.steps_of(method, config)
    out = Path(config.output_dir or f"runs/compare-{config.task}-{time.strftime('%Y%m%d-%H%M%S')}")
    with progress.reporting(quiet), _alone(out, config, plan):
        return _compare(out, config, plan)


@contextmanager
def _alone(out: Path, config: RunConfig, plan: Plan) -> Iterator[None]:
    """The folder is this process's until the comparison ends. What can be refused is so before there is one."""
    if plan.against and plan.against not in (*plan.methods, *finished(out / "compare.json", plan)):
        raise InputError(f"against: must be a method that is compared, got {plan.against}. Name it in --methods too.")
    if is_run(out):
        raise InputError(f"output_dir: must not be a run's folder, got {out}. Choose another.")
    shared = shared_config(config, out, plan.start)
    check_folder(Path(shared.output_dir), shared, resume=True)
    for method in plan.methods:
        check_own(replace(shared, method=method))
    out.mkdir(parents=True, exist_ok=True)
    lock = RunLock(out)
    lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _compare(out: Path, config: RunConfig, plan: Plan) -> dict[str, Any]:
    earlier = finished(out / "compare.json", plan)
    runner = _Runner(out, shared_config(config, out, plan.start), config)
    prepared = runner.result(Job("prepare", plan.start))
    key = METHODS[runner.config.method_of(0)].rate
    learnt, given = getattr(runner.config, key), getattr(config, key)
    if plan.start == "iteration" and learnt != given:
        progress.say(
            f"{key}: iteration 0, from which all start, was trained at {learnt:g}; {given:g} is for the trainings."
        )
    start = prepared["start"]
    if plan.start == "sft":
        start[PER_ANSWER] = [0.0] * len(start["rewards"])  # by definition; earlier versions had estimated it
    if (samples := start.get(SAMPLES, 1)) != config.eval_samples:  # by an earlier version
        answers = several(samples, "answer")
        progress.say(f"eval_samples: this comparison was begun with {answers} to each held-out prompt, and goes on so")
    if "rows" in prepared:  # earlier versions kept none
        progress.say(prepared["rows"])
    inference = runner.result(Job("inference", plan.start))["peak_mb"]
    methods = {name: {**kept, "curve": [start_point(start), *kept["curve"][1:]]} for name, kept in earlier.items()}
    failed: dict[str, Stopped] = {}
    for method in plan.methods:
        try:
            methods[method] = _method(runner, plan, method, start)
        except Stopped as error:
            failed[method] = error
            progress.say(f"{method}: failed: {error}")
    if len(failed) == len(plan.methods):
        first, why = next(iter(failed.items()))
        kind = InputError if isinstance(why, JobFailed) else Stopped
        raise kind(f"methods: none could be run; {first}: {why}")
    result: dict[str, Any] = {
        "plan": {**asdict(plan), "methods": list(plan.methods)},
        "beta": config.beta,
        "sft_steps": config.sft_steps,
        "max_kl": config.max_kl,
        "prompts": len(start["rewards"]),
        "inference_peak_mb": inference,
        "start": start_point(start),
        "reward_quality": _reward_quality(out, plan, prepared),
        "before": state([start], start),
        "texts": start.get("texts", []),
        **beside(methods, plan.against),
        "failed": {method: str(error) for method, error in failed.items()},
        "out": str(out),
    }
    write_text(out / "compare.json", json.dumps(plain(result), indent=2))
    write_text(out / "compare.md", markdown(result))
    write_page(result, out)
    write_plots(result, out)
    return result


def _reward_quality(out: Path, plan: Plan, prepared: dict[str, Any]) -> dict[str, Any]:
    """What the reward model that all rewards are by is worth on held-out rows: the first one, or the one refined after
    iteration 0, which earlier versions had not measured."""
    if plan.start == "iteration":
        return dict(prepared.get("reward_quality", {}))
    return reward_quality(read_metrics(Layout(out / "shared").metrics()))


def _method(runner: _Runner, plan: Plan, method: str, start: dict[str, Any]) -> dict[str, Any]:
    """Search the learning rate, train with every seed, and summarise."""
    rate = plan.rate(method, runner.given)
    if line := plan.left_out_rate(method, runner.given):
        progress.say(line)
    steps = plan.steps_of(method, runner.config)
    full = Job("train", plan.start, method, 0, rate, steps, plan.budget_minutes * 60, plan.points)
    if plan.budget_minutes:
        pace = _pace(runner, plan, replace(full, steps=PROBE_STEPS, budget_seconds=0.0, points=0))
        full = replace(full, steps=max(1, math.floor(full.budget_seconds * pace)))
    search = _search(runner, plan, full) if plan.search_trials > 1 else []
    best = max(search, key=lambda line: line["objective"])["learning_rate"] if search else rate
    results = [runner.result(replace(full, seed=seed, learning_rate=best)) for seed in range(plan.seeds)]
    summary, a_step = method_summary(results, start), runner.config.answers_a_step(method)
    answers = {"answers": round(summary["curve"][-1]["step"] * a_step), "answers_a_step": a_step}
    return {**summary, **answers, "learning_rate": best, "seeds": plan.seeds, "search": search}


def _pace(runner: _Runner, plan: Plan, probe: Job) -> float:
    """Steps a second. A rate at which the probe fails is lowered as in the search: a step takes as long at any rate."""
    for power in range(plan.search_trials):
        rate = plan.rate(probe.method, runner.given, -power)
        try:
            found = runner.result(replace(probe, learning_rate=rate))
        except JobFailed as error:
            failed = error
            progress.say(f"{probe.method}: learning rate {rate:g} failed: {error}")
        else:
            return float(found["steps"] / found["seconds"])
    raise failed


def _search(runner: _Runner, plan: Plan, full: Job) -> list[dict[str, float]]:
    """Reward, KL and what is maximised, reward less beta KL, of a short training with each rate; diverged ones out."""
    lines: list[dict[str, float]] = []
    objectives: dict[int, float] = {}
    while (power := plan.next_power(objectives)) is not None:
        rate = plan.rate(full.method, runner.given, power)
        objectives[power] = -math.inf
        try:
            point = runner.result(plan.trial(replace(full, learning_rate=rate)))["points"][-1]
        except JobFailed as error:
            progress.say(f"{full.method}: learning rate {rate:g} failed: {error}")
            continue
        reward, kl = fmean(point["rewards"]), kl_per_answer(point[PER_ANSWER])
        objective = reward - runner.config.beta * kl
        if math.isfinite(objective):
            objectives[power] = objective
            lines.append({"learning_rate": rate, "reward": reward, PER_ANSWER: kl, "objective": objective})
    if not lines:
        tried = ", ".join(f"{plan.rate(full.method, runner.given, power):g}" for power in sorted(objectives))
        raise JobFailed(f"no learning rate among {tried} could be trained")
    return sorted(lines, key=lambda line: line["learning_rate"])


def _launch(described: Path, log: Any) -> int:
    """A process of its own for one job; its exit code. What goes on there is what goes on here."""
    command = [sys.executable, "-m", "zopro.compare.worker", str(described), str(os.getpid())]
    with (
        progress.task(described.parent.name) as seen,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, encoding="utf-8", errors="replace") as process,
    ):
        try:
            for line in process.stdout or ():
                seen.tell(line.strip())
        except BaseException:  # Ctrl-C among them
            process.kill()
            raise
    return process.returncode


class _Runner:
    """Runs jobs whose result is not there yet. given: the comparison's configuration, with the rates of its trainings."""

    def __init__(self, out: Path, config: RunConfig, given: RunConfig) -> None:
        self.out, self.config, self.given = out, config, given

    def result(self, job: Job) -> dict[str, Any]:
        """The job's result, from its folder if it is finished.

        Raises:
            InputError: the process refused its input, or what it has left is damaged.
            Stopped: the machine gave out under it, and would again with another learning rate.
            JobFailed: it ended otherwise, without a result.
        """
        folder = self.out / "jobs" / job.name
        path = folder / "result.json"
        if not path.exists():
            began = time.perf_counter()
            values = {"job": asdict(job), "config": self.config.to_dict()}
            write_text(folder / "job.json", json.dumps(values, indent=2))
            with (folder / "log.txt").open("w", encoding="utf-8") as log:
                code = _launch(folder / "job.json", log)
            if code != 0 or not path.exists():
                where = f"(see {folder / 'log.txt'})"
                if code < 0:
                    raise Stopped(f"a process was {killed(code)} {where}")
                lines = (folder / "log.txt").read_bytes().strip().splitlines()  # of bytes: no line ends at U+2028
                message = lines[-1].decode("utf-8", "replace") if lines else f"ended with code {code}"
                if code == 2 and message.startswith("zopro: error: "):
                    raise InputError(message.removeprefix("zopro: error: "))
                if code == 1 and message.startswith("zopro: stopped: "):
                    raise Stopped(f"{message.removeprefix('zopro: stopped: ')} {where}")
                raise JobFailed(f"{message} {where}")
            progress.say(f"{job.name}: {seconds(time.perf_counter() - began)} s, loading and measuring included")
        return result_of(path, job)
