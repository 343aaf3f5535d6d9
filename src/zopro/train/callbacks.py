"""From a transformers trainer to `metrics.jsonl` and one progress bar.

trainer = SFTTrainer(..., callbacks=[MetricsCallback(journal.write, "sft")])
be_quiet(trainer)       # the trainer's own printing off: the callback shows what there is to see
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from zopro.errors import InputError, nearest
from zopro.store.shown import PER_TOKEN, named
from zopro.system.terminal import Progress

# Bookkeeping of transformers.Trainer: the run directory has its own seconds and sizes.
_LEFT_OUT = ("total_flos", "epoch", "train_loss")
_NOT_LISTED = ("dvclive", "flyte", "kubeflow")  # of which transformers does not say beforehand whether they are there
# Shown beside the bar, in this order, where the trainer logs them. Rewards and accuracies are those of the step's own
# batch, by the models as they are; the summary's are of held-out rows.
_SHOWN = {"loss": "loss", "reward": "train_reward", PER_TOKEN: PER_TOKEN, "accuracy": "train_accuracy"}


def be_quiet(trainer: Trainer) -> None:
    """Remove the callbacks with which a trainer prints its logs and draws its own bar."""
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)


def check_reports(names: Sequence[str]) -> None:
    """Refuse in `report_to` what transformers does not know, or what is not installed.

    Raises:
        InputError: transformers would say so, after the first training has begun.
    """
    for name in names if list(names) != ["all"] else ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(INTEGRATION_TO_CALLBACK)
            raise InputError(f"report_to: must be of {known}, got {name!r}.{nearest(name, INTEGRATION_TO_CALLBACK)}")
        if name not in (*get_available_reporting_integrations(), *_NOT_LISTED):
            raise InputError(f"report_to: {name} must be installed, and is not. Install it, or leave it out.")


class SnapshotCallback(TrainerCallback):
    """Saves the weights every `every` steps (the paper's within-iteration log); not the last ones, which are kept anyway.

    Args:
        save: writes the weights as they are to a folder.
        folder: the snapshot of step 10 becomes `folder`/000010.
        every: steps from one snapshot to the next.
    """

    def __init__(self, save: Callable[[Path], object], folder: Path, every: int) -> None:
        self.save, self.folder, self.every = save, folder, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if step % self.every == 0 and step < state.max_steps and state.is_world_process_zero:
            self.save(self.folder / f"{step:06d}")


class MetricsCallback(TrainerCallback):
    """Forwards what a trainer logs, one dictionary a line, and shows progress with the stage's name and time left.

    Args:
        log: receives `{"time": unix seconds, "stage", "iteration", "step", ...numbers}` for every line of training
            metrics. Values that are not numbers are left out; NaN and infinities become None, as JSON has neither. What
            TRL calls `kl`, the mean over the tokens of a batch, is `kl_per_token` here.
        stage: the stage's name as in metrics.jsonl: sft, reward, policy or refine.
        iteration: the loop's iteration, None outside of it.
        quiet: show no progress. It goes to stderr (`zopro.system.terminal`).
    """

    def __init__(
        self, log: Callable[[dict[str, Any]], None], stage: str, iteration: int | None = None, quiet: bool = False
    ) -> None:
        self.log, self.stage, self.iteration, self.quiet = log, stage, iteration, quiet
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.quiet or not state.is_world_process_zero:
            return
        title = self.stage if self.iteration is None else f"{self.stage} {self.iteration}"
        self._bar = Progress(title, state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero or "train_runtime" in logs:
            return  # train_runtime: the closing summary, whose seconds the stage measures itself
        numbers = {
            name: value if math.isfinite(value) else None
            for name, value in logs.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name not in _LEFT_OUT
        }
        line = {"time": time.time(), "stage": self.stage, "iteration": self.iteration, "step": state.global_step}
        line = named(line | numbers)
        if self._bar is not None:
            shown = {title: line[name] for name, title in _SHOWN.items() if line.get(name) is not None}
            self._bar.step(state.global_step, shown)
        self.log(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """End the bar's line, also where an error ends the training."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
