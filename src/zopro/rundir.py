"""A run directory: the whole truth about a run, readable without zopro (layout: docs/method.md).

Every file and folder in it appears whole or not at all: written beside its place, then renamed. `metrics.jsonl` is the
exception, appended line by line.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from zopro.config import RunConfig
from zopro.errors import InputError

PACKAGES = ("zopro", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` so that it is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    with beside.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(beside, path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file."""
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends well, and disappears when it does not."""
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(path, ignore_errors=True)
    os.replace(beside, path)


class RunDirectory:
    """Paths and records of one run.

    Raises:
        InputError: the directory holds a run of another configuration, or (without `resume`) any run, or other files.
    """

    def __init__(self, config: RunConfig, resume: bool) -> None:
        default = f"runs/{config.task}-{config.method}-{time.strftime('%Y%m%d-%H%M%S')}"
        self.path = Path(config.output_dir or default)
        self.resumed = self._check(config, resume)
        self.metrics_path = self.path / "metrics.jsonl"
        self._config = config

    def create(self) -> None:
        """Write the configuration and the environment; nothing of the run is on disk before this."""
        if not self.resumed:
            write_text(self.path / "environment.json", json.dumps(environment(), indent=2))
            write_text(self.path / "config.yaml", yaml.safe_dump(self._config.to_dict(), sort_keys=False))

    def _check(self, config: RunConfig, resume: bool) -> bool:
        saved_config = self.path / "config.yaml"
        if not saved_config.exists():
            ours = {"environment.json", "demo"}  # an interrupted start; the demo's data
            if self.path.exists() and any(entry.name not in ours for entry in self.path.iterdir()):
                raise InputError(f"output_dir: must be empty or a run of zopro, got {self.path}. Choose another folder.")
            return False
        saved = yaml.safe_load(saved_config.read_text(encoding="utf-8"))
        for key, value in config.to_dict().items():
            if key != "output_dir" and saved.get(key) != value:
                raise InputError(
                    f"output_dir: {self.path} belongs to another config ({key} is {saved.get(key)!r} there, {value!r} "
                    "here). Use that config or another output_dir."
                )
        if not resume:
            raise InputError(f"output_dir: {self.path} holds a run already. Continue it with --resume or choose another.")
        return True

    def sft(self) -> Path:
        return self.path / "sft"

    def initial(self) -> Path:
        """The policy's adapter before SFT, from which the SFT update is measured."""
        return self.path / "initial"

    def trainer(self, stage: str) -> Path:
        """Where a stage's trainer may write: logs of `report_to`, nothing that the run needs."""
        return self.path / "trainer" / stage

    def policy(self, iteration: int) -> Path:
        return self.path / "policy" / f"{iteration:03d}"

    def reward(self, iteration: int) -> Path:
        return self.path / "reward" / f"{iteration:03d}"

    def snapshots(self, kind: str, iteration: int) -> Path:
        """Weights inside one iteration, by step; `kind` is policy or reward."""
        return self.path / "snapshots" / kind / f"{iteration:03d}"

    def iteration(self, iteration: int) -> Path:
        return self.path / "iterations" / f"{iteration:03d}"

    def evaluation(self, iteration: int | None, suffix: str = ".jsonl") -> Path:
        name = "sft" if iteration is None else f"{iteration:03d}"
        return self.path / "evaluations" / (name + suffix)

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, stamped with the time."""
        with self.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"time": round(time.time(), 3), **line}) + "\n")

    def discard(self, stage: str, iteration: int | None) -> None:
        """Drop the lines of an interrupted attempt at a stage, so that its steps are not counted twice."""
        lines = self.metrics()
        kept = [line for line in lines if (line["stage"], line["iteration"]) != (stage, iteration)]
        if len(kept) < len(lines):
            self.write_rows(self.metrics_path, kept)

    def metrics(self) -> list[dict[str, Any]]:
        return read_rows(self.metrics_path) if self.metrics_path.exists() else []

    def write_rows(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }
