"""What a run directory must hold for the commands that come after the run. Paths only: no library is imported for it.

policy = find_policy("runs/a", iteration=1)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from zopro.config import RunConfig
from zopro.config.reading import read_yaml
from zopro.errors import InputError
from zopro.loop.beforehand import check_base
from zopro.store.durable import unwritable_at, whole_lines
from zopro.store.layout import Layout, numbered
from zopro.store.rundir import followed
from zopro.weights.names import has_weights, is_adapter


@dataclass(frozen=True)
class Policy:
    """One iteration's policy in a run directory: an adapter over `config.model`, or a model (`lora_r: 0`)."""

    run: Path
    config: RunConfig
    iteration: int
    folder: Path


def check_run(run: str | Path) -> Layout:
    """The paths of a run directory. Raises `InputError`: it is none."""
    layout = Layout(run)
    if not layout.config().is_file():
        raise InputError(f"RUN: must be a run directory, got '{run}' (no config.yaml in it).")
    return layout


def check_new(out: str | Path) -> Path:
    """Where a whole folder may be put.

    Raises `InputError`: `out` exists and is not an empty folder, or cannot be made or replaced.
    """
    out = Path(out)
    if out.exists():
        if not out.is_dir() or any(out.iterdir()):
            what = "not empty" if out.is_dir() else "a file"
            raise InputError(f"--out: must be a new or empty folder, got '{out}' ({what}). Choose another.")
        if os.path.ismount(out) or out.samefile(Path.cwd()):
            what = "where a disk is mounted" if os.path.ismount(out) else "in which the command runs"
            raise InputError(f"--out: must be a folder that can be replaced, got '{out}', {what}. Choose one in it.")
    if reason := unwritable_at(out):
        raise InputError(f"--out: must be a folder that can be written to, got '{out}' ({reason}). Choose another.")
    return out


def find_policy(run: str | Path, iteration: int | None = None) -> Policy:
    """As `kept_policy`, of a run whose base model can be opened. Raises `InputError` too where it is not there."""
    policy = kept_policy(run, iteration)
    try:
        check_base(policy.config)
    except InputError as error:
        remedy = f"It stands in '{Layout(run).config()}': correct it there, or go to the folder where the run was begun."
        raise InputError(f"{error} {remedy}") from None
    return policy


def kept_config(run: str | Path) -> RunConfig:
    """The configuration of a run directory, with its own paths as they are now. Raises `InputError`: it is damaged."""
    path = Layout(run).config()
    values = read_yaml(path)
    try:
        return followed(RunConfig.from_dict(values), Path(run))
    except InputError as error:
        raise InputError(f"'{path}': must be the run's configuration, but {error}") from None


def kept_policy(run: str | Path, iteration: int | None = None) -> Policy:
    """Return the policy of `iteration` (default: the newest) of run directory `run`.

    Raises `InputError` if `run` is no run directory or has no such policy.
    """
    run, layout = Path(run), check_run(run)
    found = {number: path for number, path in numbered(layout.policies()).items() if has_weights(path)}
    if not found:
        raise InputError(f"RUN: must hold a finished policy, got '{run}' (none yet). Continue it with --resume.")
    newest = max(found) if iteration is None else iteration
    if newest not in found:
        raise InputError(f"--iteration: must be one of {', '.join(map(str, sorted(found)))}, got {iteration}.")
    return Policy(run, kept_config(run), newest, found[newest])


def check_export(policy: Policy, merged: bool, gguf: bool) -> None:
    """Raise `InputError` for what cannot be made of a policy."""
    if merged and policy.config.served:
        raise InputError(
            f"--merged: must not be given, engine {policy.config.engine} holds the weights. Export the adapter."
        )
    if gguf and (merged or not is_adapter(policy.folder)):
        remedy = "Leave --merged out." if is_adapter(policy.folder) else "Convert it by llama.cpp's own script."
        raise InputError(f"--gguf: must be given for an adapter alone, got a model. {remedy}")


def check_answering(max_new_tokens: int | None, temperature: float, seed: int) -> None:
    """Raise `InputError` for a way to answer that there is none of."""
    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"--max-new-tokens: must be at least 1, got {max_new_tokens}.")
    if temperature < 0:
        raise InputError(f"--temperature: must not be negative, got {temperature}. 0 takes the likeliest token.")
    if temperature and not 1e-6 <= temperature <= 1e6:
        raise InputError(f"--temperature: must be 0 or lie in [1e-6, 1e6], got {temperature}.")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed: must not be negative, and less than 2^63, got {seed}.")


def check_text(argument: str, text: str) -> None:
    """Raise `InputError` for a text with half a character: what Python makes of bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{argument}: must be text in UTF-8, got {text[error.start]!a} in it. Convert it.") from None


def find_journal(run: str | Path, iteration: int | None = None, to_step: int | None = None) -> tuple[int, Path]:
    """The iteration (default: the newest with a journal) and its journal, which has `to_step` steps.

    Raises `InputError` if `run` is no run directory, or has no such journal or step.
    """
    layout = check_run(run)
    found = {number: path for number in numbered(layout.iterations()) if (path := layout.journal(number)).is_file()}
    if iteration is None and found:
        iteration = max(found)
    if iteration is None or iteration not in found:
        which = f"iteration {iteration} of " if iteration is not None else ""
        has = f"iterations with a journal: {', '.join(map(str, found))}" if found else "no iteration has a journal"
        raise InputError(
            f"--iteration: must be a zeroth-order one, whose steps are in a journal, got {which}'{layout.path}' ({has}). "
            "First-order steps cannot be rebuilt from scalars: use zopro export."
        )
    if to_step is not None:
        check_step(to_step, len(whole_lines(found[iteration])) - 1)
    return iteration, found[iteration]


def check_step(to_step: int, steps: int) -> None:
    """Raise `InputError` for a step that a journal of so many does not have."""
    if not 0 <= to_step <= max(0, steps):
        raise InputError(f"--to-step: must lie in [0, {steps}], the journal's steps, got {to_step}.")
