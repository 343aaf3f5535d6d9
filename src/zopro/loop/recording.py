"""From a trainer to the journal of its iteration: every zeroth-order step is on the disk before it is taken.

Recorder(trainer, path, origin).attach()         # first-order trainers have no steps that a journal could hold
"""

from __future__ import annotations

import filecmp
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from zopro.choices import DIRECTIONS, METHOD_OF_START
from zopro.config import RunConfig
from zopro.store.journal import Header, JournalWriter, Step, read
from zopro.store.rundir import RunDirectory
from zopro.weights.adapters import tensor_files, tensor_name
from zopro.zo import Targeted, groups
from zopro.zo.directions import Directions
from zopro.zo.optimizer import Recorded
from zopro.zo.records import StepRecord

TARGETED = "targeted"
"""The kind of directions made of updates and noise, as a journal names it; others are named in `DIRECTIONS`."""


@dataclass(frozen=True)
class Origin:
    """Where an iteration's steps start and which folders its directions come from, (after, before) each."""

    run: Path
    iteration: int
    method: str
    start: Path
    previous_update: tuple[Path, Path] | None = None
    reward_update: tuple[Path, Path] | None = None
    eps: float | None = None  # of the iteration before, by the same method: the last one of its steps, es's sigma

    def name(self, path: Path) -> str:
        """`path` relative to the run; what lies outside of it (a base model) by its own name."""
        return path.relative_to(self.run).as_posix() if path.is_relative_to(self.run) else str(path)


def origin_of(config: RunConfig, store: RunDirectory, iteration: int, start: str | None) -> Origin:
    """How an iteration is optimised, and from what: by `method`, along updates of the iteration before it.

    These are the policy's update mu and, where one is trained, the reward model's update v over the same iteration: the
    newest one that moved the policy, since along an update of 0 there is noise alone, at a rate that is not noise's.
    Iteration 0 has none before it. There `start` says what is done instead: "sft" takes the SFT update for mu,
    the others take another method (`METHOD_OF_START`), None takes `method` without updates.
    """
    policies = store.sft(), *map(store.policy, range(iteration))
    method, mu, v, eps = config.method, None, None, None
    if iteration > 0:
        eps = _last_eps(store.journal(iteration - 1), method)
        last = newest_update(policies)
        mu = policies[last + 1], policies[last]
        v = (store.reward(last + 1), store.reward(last)) if config.trains_reward else None
    elif start == "sft":
        initial = store.initial()
        mu = policies[-1], initial if config.lora_r or initial.exists() else Path(config.model)  # as 0.1.0 has it
    elif start is not None:
        method = METHOD_OF_START[start]
    return Origin(store.path, iteration, method, policies[-1], mu, v, eps)


def _last_eps(journal: Path, method: str) -> float | None:
    """eps of the last step of a journal; None without a journal, of another method, or where it never was a number."""
    if not journal.exists() or (found := read(journal)).header.method != method:
        return None
    return next((step.record.eps[0] for step in reversed(found.steps) if math.isfinite(step.record.eps[0])), None)


def newest_update(policies: Sequence[Path]) -> int:
    """The last iteration that moved the policy; where none has, the last one.

    Args:
        policies: folders of the start, and of what each iteration made of it.
    """
    iterations = range(len(policies) - 2, -1, -1)
    return next((i for i in iterations if _differ(policies[i + 1], policies[i])), len(policies) - 2)


def _differ(after: Path, before: Path) -> bool:
    files = {file.name: file for file in before.glob("*.safetensors")}
    pairs = [(file, files.get(file.name)) for file in after.glob("*.safetensors")]
    return any(other is None or not filecmp.cmp(file, other, shallow=False) for file, other in pairs)


class Recorder(TrainerCallback):
    """Writes the journal of one policy iteration.

    Args:
        trainer: a `checkpointed` one; its optimiser is a `zopro.SPSA` or `zopro.ES`, else nothing is recorded.
        path: the journal. A trainer that begins at step 0 begins it anew; one that continues a checkpoint keeps the
            lines up to it and appends to them.
        origin: what the journal's header says.
        writes: False on the ranks of a job that only take part.
        rebuild: leave the parameters out of checkpoints (they are whole models) and rebuild them from the journal.

    Raises (when training begins):
        InputError: the journal on the disk does not fit the checkpoint; see `JournalWriter`.
    """

    def __init__(self, trainer: Any, path: Path, origin: Origin, rebuild: bool = False, writes: bool = True) -> None:
        self.trainer, self.path, self.origin, self.rebuild, self.writes = trainer, path, origin, rebuild, writes
        self._writer: JournalWriter | None = None

    def attach(self) -> None:
        """Record the trainer's coming `train()`."""
        self.trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        spsa = getattr(optimizer, "optimizer", optimizer)
        if not isinstance(spsa, Recorded):
            return
        if state.global_step and self.trainer.rebuilt:  # on every rank
            for step in read(self.path).steps[: state.global_step]:
                spsa.replay(step.record)
        self.trainer.rebuilt = self.rebuild and _rebuilds(spsa.directions)
        if self.writes and state.is_world_process_zero:
            self._writer = JournalWriter(self.path, header_of(self.origin, spsa), keep=state.global_step)
            spsa.before_apply = self._write

    def _write(self, record: StepRecord) -> None:
        assert self._writer is not None
        batch = getattr(self.trainer, "last_batch", None)
        exchanged = getattr(self.trainer, "exchanged_bytes", 0)
        reward, rows = (batch.reward, batch.rows) if batch else (None, [])
        self._writer.write(Step(record, reward, rows, exchanged))


def _rebuilds(directions: Directions) -> bool:
    """Whether a journal's header says all that the directions are made of."""
    noise = directions.noise if type(directions) is Targeted else directions
    return DIRECTIONS.name_of(type(noise)) is not None


def header_of(origin: Origin, spsa: Recorded) -> Header:
    """The first line of the journal of `spsa`'s steps."""
    trained = [name for name, _, _ in groups.named(spsa.param_groups)]
    files = tensor_files(origin.start)
    saved = {tensor_name(name) for name in files}
    directions = _described(spsa.directions)
    folders = [origin.start]
    targeted = isinstance(spsa.directions, Targeted)
    for key in _updates_of(spsa.directions):
        pair = getattr(origin, key) if not targeted or len(getattr(spsa.directions, key)) else None
        directions[key] = None if pair is None else [origin.name(folder) for folder in pair]
        folders += pair or ()
    if targeted:
        for key in ("total_steps", "decay", "normalize"):
            directions[key] = getattr(spsa.directions, key)
        directions["noise"] = _described(spsa.directions.noise)
    used = dict.fromkeys(file for folder in dict.fromkeys(folders) for file in tensor_files(folder).values())
    return Header(
        iteration=origin.iteration,
        method=origin.method,
        start=origin.name(origin.start),
        directions=directions,
        files={origin.name(file): digest(file) for file in used},
        untrained=sorted(saved - set(trained)),
        unsaved=sorted(set(trained) - saved),
        device=spsa.param_groups[0]["params"][0].device.type,
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("zopro", "torch")},
    )


def _updates_of(directions: Directions) -> tuple[str, ...]:
    """Which of the origin's updates directions are made of."""
    if isinstance(directions, Targeted):
        return "previous_update", "reward_update"
    name = DIRECTIONS.name_of(type(directions))
    return ("previous_update",) if name is not None and DIRECTIONS[name].of_update else ()


def _described(directions: Directions) -> dict[str, Any]:
    name = TARGETED if type(directions) is Targeted else DIRECTIONS.name_of(type(directions))
    keeps = DIRECTIONS[name].keeps if name is not None and name in DIRECTIONS else ()
    return {"kind": name or type(directions).__name__} | {key: getattr(directions, key) for key in keeps}


def digest(path: Path) -> str:
    """sha256 of a file, as `sha256sum` prints it."""
    total = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            total.update(block)
    return total.hexdigest()
