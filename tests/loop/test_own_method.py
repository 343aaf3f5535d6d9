"""A method of the user's is tried before the first stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny_runs import config
from zopro.loop.opening import open_all
from zopro.train.methods import PolicyInputs, first_order


def mine(inputs: PolicyInputs) -> Any:
    return first_order(inputs)


def test_any_seed_of_a_run_will_do(folder: Path, tmp_path: Path) -> None:
    """Trainers take seeds below 2^32 alone."""
    run, _, _ = open_all(config(folder, tmp_path / "run", method=f"python:{__name__}:mine", seed=2**33), writes=False)
    run.store.lock.release()
