"""Checkpoints in time order: of a run of zopro, or of any folder of adapters or models, ours or others'.

    from zopro.analysis.reading.checkpoints import of_folder, of_run
    policy, reward = of_run(Path("RUN"))

Only headers are read here. A trajectory's checkpoints must hold the same tensors in the same shapes; what does not fit
is refused with the name of the file.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zopro.analysis.reading.places import folder_at, run_at
from zopro.analysis.reading.records import read_config, start_of
from zopro.errors import InputError
from zopro.store.layout import Layout, numbered
from zopro.weights.adapters import weight_files, weight_name
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE, MODEL_FILES
from zopro.weights.tensors import Stored, read_header

log = logging.getLogger(__name__)

BEYOND = (
    *("use_dora", "lora_bias", "use_qalora", "use_bdlora", "target_parameters"),
    *("kasa_config", "monteclora_config", "arrow_config"),
)
"""PEFT's options of LoRA whose effect on a weight is not scale * B A."""
_FACTOR = re.compile(r"\.lora_(A\.weight|B\.weight|embedding_A|embedding_B)$")
_NO_FACTOR = re.compile(r"\.(lora|hada|lokr|loha|ia3|vera|randlora|oft|boft|hra|fourierft|vblora|shira|road|bone|miss)_")
PICKLES = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class AdapterOptions:
    """What `adapter_config.json` says about the size of the product B A (PEFT's names)."""

    alpha: float | None = None
    rslora: bool = False
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    transposed: bool = False  # fan_in_fan_out: the base weight is stored as [in, out]

    def scale(self, module: str, rank: int) -> float:
        """lora_alpha / r, or lora_alpha / sqrt(r) with rank-stabilised LoRA; 1 if the folder has no configuration."""
        alpha = next((value for key, value in self.alpha_pattern.items() if _matches(key, module)), self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@dataclass(frozen=True)
class Checkpoint:
    """One saved adapter or model.

    `step` is None at the end of an iteration and counts the optimiser steps of a snapshot inside one.
    """

    path: Path
    label: str
    tensors: Mapping[str, Stored]
    options: AdapterOptions | None  # None: a whole model
    iteration: int | None = None
    step: int | None = None


@dataclass(frozen=True)
class Trajectory:
    """Checkpoints in time order, all with the same tensors; `name` is policy or reward.

    A run that trains no reward model has none of it.
    """

    name: str
    checkpoints: Sequence[Checkpoint]

    def __post_init__(self) -> None:
        if len(self.checkpoints) == 1 or (self.name == "policy" and not self.checkpoints):
            where = self.checkpoints[0].path if self.checkpoints else "none"
            raise InputError(
                f"{self.name}: must have at least 2 checkpoints to compare, got {where}. Save more of them, or train on."
            )
        for checkpoint in self.checkpoints[1:]:
            _same_tensors(self.checkpoints[0], checkpoint)

    @property
    def tensors(self) -> Mapping[str, Stored]:
        return self.checkpoints[0].tensors if self.checkpoints else {}

    @property
    def adapter(self) -> bool:
        return all(checkpoint.options is not None for checkpoint in self.checkpoints)

    @property
    def main(self) -> list[int]:
        """Positions of the checkpoints that begin or end an iteration."""
        return [i for i, checkpoint in enumerate(self.checkpoints) if checkpoint.step is None]


def of_run(run: Path) -> tuple[Trajectory, Trajectory]:
    """The policy's trajectory (from what iteration 0 begins with) and the reward model's, with the snapshots there are.

    The latter is empty if the run trains none, or is not past the first.

    Raises:
        InputError: `run` is no run directory, has no policy yet, or lacks a checkpoint before its newest one.
    """
    layout = run_at(run)
    if not layout.sft().is_dir():
        raise InputError(f"{layout.sft()}: must be there, as the policies begin from it, got no such folder. Restore it.")
    policy = [read(layout.sft(), start_of(read_config(run)).name)]
    for number, folder in _complete(layout.policies(), layout.policy).items():
        policy += _snapshots(layout, "policy", number)
        policy.append(read(folder, f"policy {number}", iteration=number))
    reward: list[Checkpoint] = []
    for number, folder in _complete(layout.rewards(), layout.reward).items():
        if reward:
            reward += _snapshots(layout, "reward", number - 1)
        reward.append(read(folder, f"reward {number}", iteration=number - 1 if number else None))
    return Trajectory("policy", policy), Trajectory("reward", reward if len(reward) > 1 else [])


def _complete(folder: Path, place: Callable[[int], Path]) -> dict[int, Path]:
    """The numbered checkpoints of a folder, of which none is missing: an update is from each to the next."""
    found = numbered(folder)
    for number in range(max(found, default=-1)):
        if number not in found:
            raise InputError(f"{place(number)}: must be there, as a later one is, got no such folder. Restore it.")
    return found


def of_folder(folder: str | Path, name: str) -> Trajectory:
    """A folder of checkpoints, in the natural order of their names (checkpoint-9 before checkpoint-10).

    Each is a folder with an adapter or a model, or a .safetensors file of its own. Weights beside such folders, as a
    trainer leaves them at its end, are not taken.
    """
    folder = folder_at(folder, name)
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    places = [entry for entry in inside if entry.is_dir() and (weight_files(entry) or _pickled(entry))]
    if weight_files(folder):
        if len(places) < 2:
            raise InputError(
                f"--{name}: must be a folder of checkpoints, got '{folder}', which is one. Give the one above."
            )
        log.warning("--%s: takes the %d checkpoints inside '%s', not its own weights.", name, len(places), folder)
    places = places or [entry for entry in inside if entry.suffix == ".safetensors"]
    if not places:
        raise InputError(
            f"--{name}: must hold folders with {ADAPTER_FILE} or {MODEL_FILES}, got '{folder}', which has none."
        )
    places.sort(key=natural)
    if len({re.sub(r"\d+", "", place.name) for place in places}) > 1:
        order = ", ".join(place.name for place in places)
        log.warning("--%s: takes these in this order: %s. Move away what is no part of it.", name, order)
    return Trajectory(name, [read(place, place.stem if place.is_file() else place.name) for place in places])


def read(place: Path, label: str, iteration: int | None = None, step: int | None = None) -> Checkpoint:
    """The checkpoint in a folder, or in one safetensors file."""
    files = [place] if place.is_file() else weight_files(place)
    if not files:
        reason = f"{_pickled(place)}, a pickle: save it as safetensors" if _pickled(place) else "none"
        raise InputError(f"{place}: must hold {ADAPTER_FILE} or {MODEL_FILES}, got {reason}.")
    found = {name: stored for file in files for name, stored in read_header(file).items()}
    tensors = {weight_name(name): stored for name, stored in found.items()}
    if not tensors:
        raise InputError(f"{files[0]}: must hold floating point tensors, got none.")
    adapter = any(".lora_" in f".{name}" for name in tensors) or files[0].name == ADAPTER_FILE
    options = _options(files[0].parent / ADAPTER_CONFIG) if adapter else None
    if adapter:
        more = [name for name in tensors if _NO_FACTOR.search(f".{name}") and not _FACTOR.search(name)]
        if more:
            raise _merge_first(files[0], f"'{min(more)}'")
    if len(tensors) < len(found):
        raise _merge_first(files[0], "several adapters on one weight")
    return Checkpoint(place, label, tensors, options, iteration, step)


def natural(path: Path) -> list[tuple[int, int, str]]:
    """A sort key under which numbers inside names count as numbers."""
    words = re.split(r"(\d+)", path.name)
    return [(0, int(word), "") if word.isdecimal() else (1, 0, word) for word in words]


def _pickled(folder: Path) -> str:
    return next((name for name in PICKLES if (folder / name).exists()), "")


def _snapshots(layout: Layout, kind: str, iteration: int) -> list[Checkpoint]:
    return [
        read(place, f"{kind} {iteration}, step {step}", iteration, step)
        for step, place in numbered(layout.snapshots(kind, iteration)).items()
    ]


def _options(path: Path) -> AdapterOptions:
    if not path.is_file():
        return AdapterOptions()
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        kind = values.get("peft_type", "LORA")
        more = [key for key in BEYOND if values.get(key)] if kind == "LORA" else [f"peft_type {kind}"]
        if more:
            raise _merge_first(path, more[0])
        alpha, patterns = values.get("lora_alpha"), values.get("alpha_pattern") or {}
        for pattern in patterns:
            _check_pattern(path, pattern)
        return AdapterOptions(
            None if alpha is None else float(alpha),
            bool(values.get("use_rslora")),
            {str(key): float(value) for key, value in patterns.items()},
            bool(values.get("fan_in_fan_out")),
        )
    except InputError:
        raise
    except (OSError, ValueError, TypeError, AttributeError):
        raise InputError(f"{path}: must be a PEFT adapter configuration, got one that cannot be read.") from None


def _merge_first(path: Path, what: str) -> InputError:
    return InputError(
        f"{path}: must hold LoRA adapters whose effect on a weight is scale * B A, got {what}. Merge each checkpoint "
        "into its base (PEFT's merge_and_unload) and analyse the models."
    )


def _check_pattern(path: Path, pattern: str) -> None:
    try:
        _matches(pattern, "")
    except re.error as error:
        raise InputError(f"{path}: alpha_pattern must be of regular expressions, got '{pattern}' ({error}).") from None


def _matches(pattern: str, module: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _same_tensors(first: Checkpoint, other: Checkpoint) -> None:
    for name in _ordered(first.tensors.keys() ^ other.tensors.keys()):
        has, lacks = (first, other) if name in first.tensors else (other, first)
        where = next(iter(lacks.tensors.values())).path
        raise InputError(f"{where}: must have the tensors of {has.path}, but '{name}' is not there.")
    for name, stored in other.tensors.items():
        shape = first.tensors[name].shape
        if stored.shape != shape:
            before = first.tensors[name].path
            raise InputError(f"{stored.path}: '{name}' must have the shape {shape} as in {before}, got {stored.shape}.")


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: natural(Path(name.replace("/", "."))))
