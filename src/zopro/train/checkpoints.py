"""Continuing in the middle of a stage: checkpoints that are whole or not there, and smaller than transformers' own.

A checkpoint holds the trained parameters, optimiser, schedule, random states and the trainer's state; the base model, the
tokenizer and the reference policy are where they were. Parameters that a journal rebuilds (`rebuilt`) are left out. It is
written beside its place, flushed and renamed, so a checkpoint that can be seen is complete; then the one before it goes.
Transformers does the rest of resuming: data order, random states, schedules.

    trainer = checkpointed(SFTTrainer)(model, args=SFTConfig(folder, **save_arguments(10)), ...)
    fit(trainer)            # from the newest checkpoint in the trainer's folder, or from the beginning
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from zopro.errors import Diverged, InputError, out_of_memory
from zopro.store.durable import read_json, whole_folder
from zopro.train import kept
from zopro.train.typed import Mixin
from zopro.weights.saving import save_tensors
from zopro.weights.tensors import read_whole

PARAMETERS = "parameters.safetensors"
RANDOM = "rng_state.pth"  # transformers' name with one process; with many it has one for each
_COUNTERS = ("_step", "_total_train_tokens")  # of TRL's trainers, which transformers does not know
_NAME = re.compile(r"checkpoint-(\d+)")


def save_arguments(every: int, logging_steps: int = 1) -> dict[str, Any]:
    """The training arguments of a checkpoint every `every` steps (0: none), never between two lines of the log."""
    if every == 0:
        return {"save_strategy": "no"}
    return {"save_strategy": "steps", "save_steps": -(-every // logging_steps) * logging_steps}


def newest(folder: str | Path) -> tuple[int, Path | None]:
    """Step and path of the newest checkpoint in a trainer's folder; (0, None) if there is none."""
    found = [(int(match[1]), path) for path in Path(folder).glob("*") if (match := _NAME.fullmatch(path.name))]
    return max(found, default=(0, None))


def clear(folder: str | Path, keep: Path | None = None) -> None:
    """Delete the checkpoints in a trainer's folder but `keep`, finished or not, and the folder itself if it is empty.

    Rewards that were kept for a step done again go too: `keep` is after it, or the stage's output is there.
    """
    folder = Path(folder)
    for path in folder.glob(kept.FILES):
        path.unlink(missing_ok=True)
    for path in folder.glob("*"):
        if _NAME.search(path.name) and path != keep:
            shutil.rmtree(path)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def fit(trainer: Trainer) -> TrainOutput:
    """`trainer.train()`, continued from the newest checkpoint in its folder if there is one."""
    path = newest(trainer.args.output_dir)[1]
    if path is not None:
        read_json(path / "trainer_state.json")
    return trainer.train(resume_from_checkpoint=None if path is None else str(path))


@contextmanager
def _readable(checkpoint: str | None) -> Iterator[None]:
    """Raise `InputError` in place of what torch and transformers raise on a damaged file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{checkpoint}: is damaged ({reason:.200}). Delete the folder to begin the stage anew."
        ) from error


def _damage(file: Path, error: Exception) -> str:
    return f"{file.parent}: {file.name} is damaged ({error}). Delete the folder to begin anew."


class CheckpointMixin(Mixin):
    """What `checkpointed` puts in front of a trainer class; use that function rather than this class."""

    _reading = staticmethod(_readable)
    rebuilt = False  # whoever sets this puts the parameters back when a resumed training begins

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # After the last step transformers would resume with one more; the stage's own output is a moment away.
        if self.state.global_step >= self.state.max_steps or not self.args.should_save:
            return
        if self.args.world_size == 1:  # with many it gathers from ranks that are not here
            self.store_flos()
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with whole_folder(folder) as partial:
            if not self.rebuilt:
                save_tensors(self._trained(), partial / PARAMETERS)
            self._save_optimizer_and_scheduler(str(partial))
            self._save_rng_state(str(partial))
            for own in partial.glob("rng_state_*.pth"):
                own.rename(partial / RANDOM)
            self.state.save_to_json(str(partial / "trainer_state.json"))
            counters = {name: getattr(self, name) for name in _COUNTERS if hasattr(self, name)}
            (partial / "counters.json").write_text(json.dumps(counters), encoding="utf-8")
        clear(folder.parent, keep=folder)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The first rank's random states on every rank, which all have the same: so their number may change."""
        if checkpoint is None or self.args.world_size == 1:
            with _readable(checkpoint):
                super()._load_rng_state(checkpoint)
            return
        with _readable(checkpoint), tempfile.TemporaryDirectory() as folder:
            shutil.copy(Path(checkpoint) / RANDOM, Path(folder) / f"rng_state_{self.args.process_index}.pth")
            super()._load_rng_state(folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with _readable(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the trainer's own. Raises `Diverged` where the loss is not finite, unless SPSA leaves such a step out."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if not hasattr(type(self), "spsa") and not bool(loss.isfinite().all()):
            raise Diverged(f"the loss of step {self.state.global_step + 1} is {float(loss.sum())}")
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        for name, value in read_json(folder / "counters.json").items():
            setattr(self, name, value)
        if not (folder / PARAMETERS).exists():
            self.rebuilt = True
            return
        saved, trained = read_whole(folder / PARAMETERS, _damage), self._trained()
        if saved.keys() != trained.keys():
            raise InputError(f"{folder}: must hold this stage's parameters, got others. Delete it to begin anew.")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}


def checkpointed(trainer_cls: type) -> type:
    """A `transformers.Trainer` subclass whose checkpoints are those described above."""
    return type(trainer_cls.__name__, (CheckpointMixin, trainer_cls), {})
