"""Where trajectories are: what is refused by its path alone, before anything is read."""

from __future__ import annotations

from pathlib import Path

from zopro.errors import InputError
from zopro.store.layout import Layout


def run_at(run: Path) -> Layout:
    """The paths of a run directory. Raises `InputError`: it is none."""
    if not run.is_dir():
        raise InputError(f"RUN: must be a run directory, got '{run}' (no such folder).")
    layout = Layout(run)
    if not layout.sft().is_dir() and not layout.policies().is_dir():
        raise InputError(f"RUN: must hold the folders sft and policy of a run, got '{run}'.")
    return layout


def folder_at(folder: str | Path, name: str) -> Path:
    """A folder of checkpoints, for `--name`. Raises `InputError`: there is none."""
    if not Path(folder).is_dir():
        raise InputError(f"--{name}: must be a folder of checkpoints, got '{folder}' (no such folder).")
    return Path(folder)
