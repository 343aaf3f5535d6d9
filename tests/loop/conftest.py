"""A small run, made once a process: tests read it, or a copy."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from one_run import AGO, BEFORE, no_figures
from tiny_runs import config, write_inputs
from zopro.config import RunConfig
from zopro.loop import pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """Its caller had begun 100 seconds earlier, as the demo has; its policy moves; its figures are left out."""
    moving = {"dtype": "float32", "learning_rate": 0.02, "lora_target_modules": "all-linear"}
    settings = config(folder, tmp_path_factory.mktemp("run") / "run", **moving)
    with pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        return settings, pipeline.run(settings, quiet=True, began=time.perf_counter() - AGO, before=BEFORE)
