"""From a transformers trainer to `metrics.jsonl` and to what is shown of its steps.

trainer = SFTTrainer(..., callbacks=[MetricsCallback(journal.write, "sft")])
be_quiet(trainer)       # the trainer's own printing off: the callback shows what there is to see
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

from zopro.errors import InputError, nearest
from zopro.store import shown
from zopro.store.shown import PER_ANSWER, PER_TOKEN, named
from zopro.system import progress

# Bookkeeping of transformers.Trainer: the run directory has its own seconds and sizes.
_LEFT_OUT = ("total_flos", "epoch", "train_loss")
_NOT_LISTED = ("dvclive", "flyte", "kubeflow")  # of which transformers does not say beforehand whether they are there
LENGTH = "completions/mean_length"
"""TRL's name for the tokens of a step's answers: with the KL of a token, the KL of an answer."""
# Shown beside the steps, in this order, where the trainer logs them: of the step's own batch, by the models as they are;
# the summary's are of held-out rows. A policy's loss says nothing: its differences are what a step goes by.
_FITTED = {
    "loss": ("loss", shown.reward),
    "accuracy": ("train accuracy", shown.share),
    "mean_token_accuracy": ("token accuracy", shown.share),
}
_POLICY = {
    "reward": ("train reward", shown.reward),
    PER_ANSWER: ("KL an answer", shown.kl),
    "signal_to_noise": ("signal", shown.signal),
}


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
    """Forwards what a trainer logs, one dictionary a line, and counts its steps (`zopro.system.progress`).

    Args:
        log: receives `{"time": unix seconds, "stage", "iteration", "step", ...numbers}` for every line of training
            metrics. Values that are not numbers are left out; NaN and infinities become None, as JSON has neither. What
            TRL calls `kl`, the mean over the tokens of a batch, is `kl_per_token` here.
        stage: the stage's name as in metrics.jsonl: sft, reward, policy or refine.
        iteration: the loop's iteration, None outside of it.
    """

    def __init__(self, log: Callable[[dict[str, Any]], None], stage: str, iteration: int | None = None) -> None:
        self.log, self.stage, self.iteration = log, stage, iteration
        self._steps: progress.Task | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._steps = progress.begin("", state.max_steps, "steps", state.global_step, lasting=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._steps is not None:
            self._steps.step(state.global_step)

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
        if self._steps is not None:
            self._steps.step(state.global_step, _told(line))
        self.log(line)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """No more steps, also where an error ends the training."""
        if self._steps is not None:
            progress.end(self._steps)
            self._steps = None


def kl_of_answers(numbers: Mapping[str, Any]) -> float | None:
    """KL(policy || SFT) in nats an answer, of what a trainer has logged of a step; None where it has not.

    >>> kl_of_answers({"kl": 0.25, "completions/mean_length": 16.0}), kl_of_answers({"reward": 1.0})
    (4.0, None)
    """
    of_token, length = numbers.get("kl", numbers.get(PER_TOKEN)), numbers.get(LENGTH)
    return None if of_token is None or length is None else of_token * length


def _told(line: Mapping[str, Any]) -> dict[str, str]:
    """What a person makes something of: of a policy its reward, its distance and whether its steps see anything."""
    numbers = {**line, PER_ANSWER: kl_of_answers(line)}
    names = _POLICY if line["stage"] == "policy" else _FITTED
    return {title: form(numbers[name]) for name, (title, form) in names.items() if numbers.get(name) is not None}
