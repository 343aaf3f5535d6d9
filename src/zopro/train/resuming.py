"""Going on from a checkpoint of transformers' own: what it cannot be resumed from gets one line, and so does what it
keeps of the settings whatever the arguments say.

    trainer.train(resume_from_checkpoint=True)      # the newest in output_dir, or its path
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import TrainOutput, get_last_checkpoint

from zopro.errors import InputError, out_of_memory
from zopro.store.durable import read_json
from zopro.train.construction import ADAPTER
from zopro.train.typed import Mixin
from zopro.weights.names import ADAPTER_CONFIG

logger = logging.getLogger(__name__)

SCALES = ("lora_alpha", "alpha", "alpha_pattern", "use_rslora")  # PEFT's, by which an adapter's product is multiplied
STATE, OPTIMIZER = "trainer_state.json", "optimizer.pt"  # transformers' names


@contextmanager
def readable(folder: str | Path) -> Iterator[None]:
    """Raise InputError in place of what torch, PEFT and transformers raise of a checkpoint that does not fit."""
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or out_of_memory(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"resume_from_checkpoint: must be of this training, its model and its optimiser, got {folder} "
            f"({reason:.200}). Make the trainer as it was, or begin anew."
        ) from error


class Resuming(Mixin):
    """In front of a trainer class. Checkpoints are transformers' own, or those of `zopro.train.checkpoints`."""

    _reading = staticmethod(readable)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """The trainer's own; where all steps were taken, transformers' would take one more.

        Raises InputError: a checkpoint that is not there, or of another training.
        """
        folder = checkpoint(resume_from_checkpoint, self.args.output_dir)
        if folder is not None:
            with self._reading(folder):
                state = TrainerState.load_from_json(str(folder / STATE))
            if finished(state, self.args):
                return self._as_it_ended(folder, state)
        return super().train(None if folder is None else str(folder), *args, **kwargs)

    def _as_it_ended(self, folder: Path, state: TrainerState) -> TrainOutput:
        if self.args.should_log:
            logger.warning(
                "nothing to train: %s has all of its %d steps. Raise max_steps, or num_train_epochs, to go on",
                folder,
                state.global_step,
            )
        self._load_from_checkpoint(str(folder))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(state.global_step, 0.0, {"train_loss": 0.0, "epoch": state.epoch or 0.0})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._reading(resume_from_checkpoint):
            check_scale(Path(resume_from_checkpoint), self.model)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with self._reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if not self.args.should_log:
            return
        if not (Path(checkpoint) / OPTIMIZER).exists():
            logger.warning("%s: has no %s, so the optimiser and its schedule begin anew", checkpoint, OPTIMIZER)
            return
        for name, value, asked in kept(self.optimizer, self.args):
            logger.warning("%s: a resumed training goes on with its checkpoint's %s, not with %s", name, value, asked)


def checkpoint(asked: Any, output_dir: str | None) -> Path | None:
    """The folder to go on from, or None. Raises InputError: there is none.

    Args:
        asked: a path, True for the newest in `output_dir`, or None or False.
    """
    if asked is None or asked is False:
        return None
    holds = Path(output_dir or ".") if asked is True else Path(asked)
    newest = get_last_checkpoint(str(holds)) if holds.is_dir() else None
    if asked is True and newest is not None:
        return Path(newest)
    if asked is not True and (holds / STATE).is_file():
        return holds
    remedy = f"Give {newest}." if newest else "Give the path of one, or leave it out to begin anew."
    got = f"True, and {holds} has none" if asked is True else str(holds)
    raise InputError(
        f"resume_from_checkpoint: must be a folder checkpoint-N with {STATE}, as trainers save it, got {got}. {remedy}"
    )


def check_scale(folder: Path, model: Any) -> None:
    """Raise ValueError for an adapter that was scaled otherwise than the model's is: PEFT loads its tensors alone."""
    live = getattr(model, "peft_config", {}).get(ADAPTER)
    if live is None or not (folder / ADAPTER_CONFIG).is_file():
        return
    saved = read_json(folder / ADAPTER_CONFIG)
    for name in SCALES:
        if hasattr(live, name) and name in saved and saved[name] != getattr(live, name):
            raise ValueError(f"{name} is {saved[name]} there and {getattr(live, name)} here")


def finished(state: TrainerState, args: Any) -> bool:
    """Whether a training with these arguments has no step after those of a checkpoint."""
    if args.max_steps > 0:
        return bool(state.global_step >= args.max_steps)
    return bool((state.epoch or 0.0) >= args.num_train_epochs - 1e-6)


def kept(optimizer: Any, args: Any) -> list[tuple[str, Any, Any]]:
    """Names, values and what `args` ask for, of what a loaded optimiser has otherwise than they do."""
    group = optimizer.param_groups[0]
    found = {"learning_rate": group.get("initial_lr"), "weight_decay": group.get("weight_decay")}
    strategy = getattr(getattr(optimizer, "optimizer", optimizer), "strategy", None)
    if strategy is not None:
        found |= {"sigma": group["eps"], "eps": group["eps"], "seed": strategy.seed}
    elif "betas" in group:
        found |= {"adam_beta1": group["betas"][0], "adam_beta2": group["betas"][1], "adam_epsilon": group["eps"]}
    asked = {name: getattr(args, name, None) for name in found}
    searched = {name for name, wish in asked.items() if wish == "auto" and group.get("auto_eps")}
    differ = [name for name in found if found[name] is not None and asked[name] not in (None, found[name])]
    titles = {"seed": "seed of the directions"}
    return [(titles.get(name, name), found[name], asked[name]) for name in differ if name not in searched]
