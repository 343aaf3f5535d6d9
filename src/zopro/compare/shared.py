"""The run that all trainings of a comparison start from: the stages up to there, in the comparison's folder `shared`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.store.layout import Layout
from zopro.store.rundir import begun_with

SHARED_METHOD = "zopro"  # as the configuration of what all trainings start from has it


def shared_config(config: RunConfig, out: str | Path, start: str) -> RunConfig:
    """Of the run that all trainings of a comparison in the folder `out` start from.

    Its rates are those that it was begun with, but for one that iteration 0 has still to learn at: each training has
    its own. Where all start from SFT so are its `policy_steps`, which nothing asks for.

    Raises:
        InputError: the configuration that is there is damaged.
    """
    shared = replace(config, output_dir=str(Path(out) / "shared"), method=SHARED_METHOD)
    if not Layout(shared.output_dir).config().exists():
        return shared
    learns = start == "iteration" and not Layout(shared.output_dir).policy(0).exists()
    its_own = {METHODS[shared.method_of(0)].rate} if learns else set()
    begun = begun_with(Path(shared.output_dir), shared)
    unasked = {"policy_steps"} if start == "sft" else set()
    kept = ({METHODS[name].rate for name in METHODS} - its_own) | unasked
    return replace(shared, **{key: begun[key] for key in kept})
