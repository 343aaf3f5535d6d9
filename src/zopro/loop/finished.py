"""A finished policy in a run directory: which one, of which run, and the network under it as the run loaded it.

policy = find_policy("runs/first")
model = open_adapter(load_model(policy.config, policy.config.model), policy.folder)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zopro.config import RunConfig
from zopro.config.reading import load_config
from zopro.engine.local import models
from zopro.engine.local.starts import load_start
from zopro.engine.opening import open_base
from zopro.errors import InputError
from zopro.store.layout import Layout, numbered
from zopro.weights.adapters import ADAPTER_CONFIG, ADAPTER_FILE, MODEL_FILE, MODEL_INDEX

_WEIGHTS = (ADAPTER_FILE, MODEL_FILE, MODEL_INDEX)


@dataclass(frozen=True)
class Policy:
    """One iteration's policy in a run directory: an adapter over `config.model`, or a model (`lora_r: 0`)."""

    run: Path
    config: RunConfig
    iteration: int
    folder: Path

    @property
    def is_adapter(self) -> bool:
        return (self.folder / ADAPTER_CONFIG).is_file()


def find_policy(run: str | Path, iteration: int | None = None) -> Policy:
    """Return the policy of `iteration` (default: the newest) of run directory `run`.

    Raises `InputError` if `run` is no run directory or has no such policy.
    """
    run = Path(run)
    layout = Layout(run)
    if not layout.config().is_file():
        raise InputError(f"RUN: must be a run directory, got '{run}' (no config.yaml in it).")
    found = {number: path for number, path in numbered(layout.policies()).items() if has_weights(path)}
    if not found:
        raise InputError(f"RUN: must hold a finished policy, got '{run}' (none yet). Continue it with --resume.")
    newest = max(found) if iteration is None else iteration
    if newest not in found:
        raise InputError(f"--iteration: must be one of {', '.join(map(str, sorted(found)))}, got {iteration}.")
    return Policy(run, load_config(layout.config()), newest, found[newest])


def load_model(config: RunConfig, folder: str) -> Any:
    """The network in `folder`: the run's base by the run's engine, or a whole model that it trained."""
    device = models.resolve_device(config.device)
    if folder == config.model:
        return open_base(config, device)
    return load_start(folder, models.resolve_dtype(config.dtype, device), device, config.trust_remote_code)


def has_weights(folder: Path) -> bool:
    """Whether `folder` holds a saved adapter or model."""
    return any((folder / name).is_file() for name in _WEIGHTS)
