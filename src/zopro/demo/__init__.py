"""The embedded default: the whole loop on a tiny model and a task of its own, offline, in minutes on two CPU cores.

Everything is made on the spot and written to RUN/demo: the data (`zopro.demo.task`) and a pretrained tiny decoder
(`zopro.demo.model`). From there on it is an ordinary run with `task: preference`, judged by the task's own rule.

    zopro demo --out runs/demo
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from zopro.config import RunConfig
from zopro.demo import task
from zopro.demo.summary_table import table
from zopro.errors import InputError
from zopro.store.layout import Layout
from zopro.store.lock import RunLock
from zopro.store.rundir import RunDirectory, read_rows
from zopro.system import progress
from zopro.system.imports import importing

__all__ = ["SETTINGS", "run", "table"]

SETTINGS: dict[str, Any] = {
    "task": "preference",
    "judge": "python:zopro.demo.task:judge",
    "max_prompt_length": 32,
    "max_completion_length": 32,
    "sft_steps": 40,
    "sft_batch_size": 32,
    "sft_learning_rate": 1e-3,
    "reward_steps": 200,
    "reward_batch_size": 32,
    "reward_learning_rate": 3e-3,
    "refine_learning_rate": 5e-4,
    "policy_steps": 40,
    "prompts_per_step": 16,
    "num_generations": 4,
    # Gentle, so that iteration 0 leaves something for the zeroth-order iterations to gain.
    "first_order_learning_rate": 5e-4,
    "learning_rate": 3e-4,
    "eval_prompts": 200,
    "eval_batch_size": 100,
}
"""What the demo changes of `RunConfig`; the model, the data, seed, iterations and output_dir come with each run."""


def run(out: str | None = None, *, seed: int = 0, iterations: int = 3, quiet: bool = False) -> dict[str, Any]:
    """Make data and base model, run the whole loop and return its summary (also RUN/summary.json).

    The summary is that of `zopro.loop.pipeline.run` with the demo's own share in it: `stages["pretraining"]`, and `truth`
    (mean of the rule, in [0, 1]) in each line of `evaluations`, which comes with the judge.

    Args:
        out: run directory; by default a new one under runs/.
        seed: of everything random.
        iterations: policy iterations, the first-order one included.
        quiet: no progress on stderr.

    Raises:
        InputError: an argument out of range, or `out` holds something already; nothing was written.
    """
    start = time.perf_counter()
    directory = Path(out or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}")
    made = Layout(directory.absolute()).demo()
    train_data, eval_data = map(str, task.files(made))
    config = RunConfig(
        **SETTINGS,
        model=str(made / "model"),
        train_data=train_data,
        eval_data=eval_data,
        output_dir=str(directory),
        seed=seed,
        iterations=iterations,
    )
    RunDirectory(config, resume=False)  # refuses an unsuitable directory before anything is made
    if not task.is_own(made, seed):
        rule = f"must be empty, or what a stopped zopro demo of seed {seed} has left"
        raise InputError(f"output_dir: {rule}, got {directory} with other files in {made.name}. Choose another folder.")
    with contextlib.ExitStack() as here:
        lock = RunLock(directory)
        here.callback(lock.release)
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        here.enter_context(progress.reporting(quiet))
        with importing():
            import torch

            from zopro.demo import model
            from zopro.loop import pipeline
            from zopro.system.threads import torch_threads

        # On tensors this small more threads wait for one another longer than they compute.
        here.enter_context(torch_threads(min(torch.get_num_threads(), 2)))
        before = time.perf_counter()
        rows, _ = task.write(made, seed)
        conversations = [(row["prompt"], row[key]) for row in read_rows(rows) for key in ("chosen", "rejected")]
        model.write(Path(config.model), seed, conversations)
        pretraining = time.perf_counter() - before
        return pipeline.run(config, quiet=quiet, began=start, before={"pretraining": pretraining})
