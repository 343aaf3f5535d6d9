"""Where trajectories are: what is refused by its path alone, before anything is read."""

from __future__ import annotations

from pathlib import Path

from zopro.errors import InputError
from zopro.store.layout import Layout


def run_at(run: Path) -> Layout:
    """The paths of a run directory. Raises `InputError`: it is none."""
    if not run.is_dir():
        raise InputError(f"RUN: must be a run directory, got '{run}' ({_is_none(run)}).")
    layout = Layout(run)
    if not layout.sft().is_dir() and not layout.policies().is_dir():
        raise InputError(f"RUN: must hold the folders sft and policy of a run, got '{run}'.")
    return layout


def refuse_parts_of_run(policy: str | Path, reward: str | Path) -> None:
    """Raise `InputError` for the two folders of a run: its policies begin after iteration 0, its reward models before."""
    sides = Path(policy).resolve(), Path(reward).resolve()
    layout = Layout(sides[0].parent)
    if sides == (layout.policies(), layout.rewards()) and layout.sft().is_dir():
        raise InputError(
            f"--policy: must not be a run's beside its --reward, since its first policy is in {layout.sft()}, got "
            f"'{policy}'. Give the run: zopro analyse {layout.path}"
        )


def folder_at(folder: str | Path, name: str) -> Path:
    """A folder of checkpoints, for `--name`. Raises `InputError`: there is none."""
    if not Path(folder).is_dir():
        raise InputError(f"--{name}: must be a folder of checkpoints, got '{folder}' ({_is_none(Path(folder))}).")
    return Path(folder)


def _is_none(path: Path) -> str:
    return "a file. Give its folder" if path.is_file() else "no such folder"
