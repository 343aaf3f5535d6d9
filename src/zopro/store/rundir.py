"""A run directory: the whole truth about a run, readable without zopro (`zopro.store.layout`, docs/method.md).

Every file and folder in it appears whole or not at all (`zopro.store.durable`). `metrics.jsonl` and the journals are the
exception, appended line by line. One process at a time writes to it (`zopro.store.lock`).
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from zopro.config import RunConfig
from zopro.config.defaults import default_of
from zopro.config.reading import read_yaml
from zopro.errors import InputError
from zopro.store.durable import (
    append_line,
    fix_end,
    plain,
    read_json,
    read_json_lines,
    unwritable,
    whole_folder,
    write_text,
)
from zopro.store.layout import Layout, Outputs
from zopro.store.lock import RunLock
from zopro.store.shown import named
from zopro.store.usage import NOTED_EVERY, Usage, numbers
from zopro.system import heap, memory
from zopro.system.ranks import launched

__all__ = ["RunDirectory", "environment", "read_rows", "whole_folder", "write_text"]

FREE = (
    "output_dir",
    "checkpoint_steps",
    "parallel",
    "rank_timeout",
    "judge_timeout",
    "reward_timeout",
    "judge_base_url",
    "judge_api_key_env",
    "judge_request_timeout",
    "judge_max_retries",
    "judge_concurrency",
    "engine_timeout",
    "vllm_python",
    "vllm_flags",
    "adapter_folder",
)
"""Keys that may differ when a run is continued: they say where and how work is done, not what comes of it."""
MAY_RISE = "iterations"
"""Of a run that is continued: those that are done are what they would be in the longer run."""
PACKAGES = ("zopro", "torch", "transformers", "trl", "peft", "accelerate", "datasets")


def default_folder(config: RunConfig) -> str:
    """Where a run goes that is not told where to go."""
    name = f"{config.task}-{config.method}".replace(":", "-")
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl file."""
    return read_json_lines(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, those of earlier versions with the names of today; none before it is there.

    Raises InputError: one of them is damaged.
    """
    lines = read_json_lines(path) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not _of_a_stage(line):
            rule = "must say of which stage, iteration and step it is, and at a stage's end seconds and peak_rss_mb"
            raise InputError(f"'{path}': line {number} {rule}, got others. Restore it.")
    return [named(line) for line in lines]


def _of_a_stage(line: Mapping[str, Any]) -> bool:
    counted = all(isinstance(line.get(name, ""), int | None) for name in ("iteration", "step"))
    timed = line.get("event") != "end" or numbers(line, "seconds", "peak_rss_mb")
    return isinstance(line.get("stage"), str) and counted and timed


def is_run(path: Path) -> bool:
    """Whether a run has been begun in the folder: its configuration alone may lie anywhere."""
    return Layout(path).config().is_file() and Layout(path).environment().is_file()


class RunDirectory(Outputs):
    """Paths and records of one run; `layout` has the paths of the files about the run as a whole.

    Args:
        config: the run's configuration.
        resume: continue the run in its folder.
        writes: False on all ranks of a job but the first: nothing is checked, and what is to be written is not.
        began: when this process began to work on the run, by `time.perf_counter()`; by default now.

    Raises:
        InputError: the directory holds a run of another configuration, or (without `resume`) any run, or other files.
    """

    def __init__(self, config: RunConfig, resume: bool, writes: bool = True, began: float | None = None) -> None:
        super().__init__(config.output_dir or default_folder(config))
        self.layout = Layout(self.path)
        self.writes = writes
        self.resumed = writes and check_folder(self.path, config, resume)
        self.metrics_path = self.layout.metrics()
        self._config = config
        self.usage = Usage(self.layout.usage(), began)
        self.lock = RunLock(self.path)
        if self.resumed:
            self.lock.acquire()
            try:
                fix_end(self.metrics_path)
                self.usage.go_on(self.metrics())
            except BaseException:
                self.lock.release()  # whoever keeps the error keeps this object
                raise

    def create(self) -> None:
        """Write the configuration and the environment; nothing of the run is on disk before this.

        Of a run that is continued the keys that may differ are written: what is asked of it later finds its servers.

        Raises InputError: another process has begun a run here in the meantime.
        """
        if self.writes and not self.resumed:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self.lock.acquire()
            except OSError as error:
                raise _unusable(self.path, error.strerror) from error
            check_folder(self.path, self._config, resume=False)
            write_text(self.layout.environment(), json.dumps(environment(), indent=2))
        values = self._config.to_dict()
        begun = begun_with(self.path, self._config) if self.resumed else {}
        with suppress(OSError):  # not there, or of somebody else: the run was moved
            if (named := begun.get("output_dir")) and self.path.samefile(named):
                values["output_dir"] = named
        if self.writes and begun != values:
            if begun and begun[MAY_RISE] != values[MAY_RISE]:
                self.layout.summary().unlink(missing_ok=True)  # of a run that goes on
            write_text(self.layout.config(), yaml.safe_dump(values, sort_keys=False))

    @contextmanager
    def new_folder(self, path: Path) -> Iterator[Path | None]:
        """`whole_folder` where this process writes; None elsewhere."""
        if self.writes:
            with whole_folder(path) as partial:
                yield partial
        else:
            yield None

    def log(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, stamped with the time; a step's is on the disk before its checkpoint."""
        if not self.writes:
            return
        stamped = {"time": round(time.time(), 3), **line}
        append_line(self.metrics_path, json.dumps(plain(stamped)), flush=line.get("step") is None)
        self.usage.note(every=NOTED_EVERY)

    def discard(self, stage: str, iteration: int | None, after: int = 0) -> None:
        """Drop an interrupted attempt's lines of a stage after step `after`, so that no step is counted twice."""
        if not self.writes:
            return
        lines = self.metrics()
        kept = [
            line
            for line in lines
            if (line["stage"], line["iteration"]) != (stage, iteration) or 0 < (line["step"] or 0) <= after
        ]
        if len(kept) < len(lines):
            self.write_rows(self.metrics_path, kept)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, those of earlier versions with the names of today."""
        return read_metrics(self.metrics_path)

    def threads(self) -> int:
        """Of torch's, with which the run was begun; 0: not known. Raises InputError: the record is damaged."""
        path = self.layout.environment()
        number = read_json(path).get("threads", 0)
        if type(number) is not int or not 0 <= number < 2**16:
            raise InputError(f"'{path}': must hold the number of threads, got {number!r}. Restore it.")
        return number

    def write_rows(self, path: Path, rows: Iterable[dict[str, Any]]) -> None:
        write_text(path, "".join(json.dumps(plain(row), ensure_ascii=False) + "\n" for row in rows))


def begun_with(path: Path, config: RunConfig) -> dict[str, Any]:
    """What the run in `path` was begun with, as a configuration reads it, so that a path with ~ is the path; of keys that
    an earlier version lacked, the default of `config`'s task and engine.

    Raises:
        InputError: its configuration is damaged.
    """
    saved_config = Layout(path).config()
    try:
        saved = read_yaml(saved_config)
    except InputError:
        saved = {}
    if not saved:
        raise InputError(f"output_dir: {saved_config} must be the run's configuration, and is damaged.")
    known = {field.name: default_of(field, config.task, config.engine) for field in fields(config)}
    with suppress(InputError):  # of an earlier version's values
        saved |= RunConfig.from_dict(known | {key: saved[key] for key in saved.keys() & known.keys()}).to_dict()
    return known | saved


def followed(config: RunConfig, folder: Path) -> RunConfig:
    """The configuration of the run in `folder`, with the paths of what lies in RUN/demo as they are now."""
    return replace(config, **_own_paths(config.to_dict(), folder))


def _own_paths(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Of a demo's keys those that name a file in its own run, which may have been moved or copied since."""
    made = Layout(folder.absolute()).demo()
    named = {key: Path(str(values[key])) for key in ("model", "train_data", "eval_data")}
    own = {key: made / path.name for key, path in named.items() if path.parent.name == made.name}
    return {key: str(path) for key, path in own.items() if path.exists()}


def check_folder(path: Path, config: RunConfig, resume: bool) -> bool:
    """Whether `path` holds the run to be continued; without `resume` it must hold none. Raises as `RunDirectory`."""
    layout = Layout(path)
    saved_config = layout.config()
    if reason := unwritable(path):
        raise _unusable(path, reason)
    if not saved_config.exists():
        names = [entry.name for entry in path.iterdir()] if path.exists() else []
        strange = {name for name in names if not (name[0] == "." and name.endswith(".partial"))}
        if strange - layout.before():
            raise InputError(f"output_dir: must be empty or a run of zopro, got {path}. Choose another folder.")
        return False
    given, asked = ({**values, **_own_paths(values, path)} for values in (begun_with(path, config), config.to_dict()))
    for key, value in asked.items():
        elsewhere = key == "engine" and config.of_servers and str(given[key]).startswith("vllm")  # other servers
        alike = given[key] == value and isinstance(given[key], bool) == isinstance(value, bool)  # 1 question or true
        more = key == MAY_RISE and isinstance(given[key], int) and value > given[key]
        if key not in FREE and not alike and not elsewhere and not more:
            raise InputError(
                f"output_dir: {path} belongs to another config ({key} is {given[key]!r} there, {value!r} "
                "here). Use that config or another output_dir."
            )
    if not resume:
        further = "" if asked[MAY_RISE] == given[MAY_RISE] else f" --{MAY_RISE} {asked[MAY_RISE]}"
        again = f"zopro run {shlex.quote(str(saved_config))} --resume{further}"
        raise InputError(f"output_dir: {path} holds a run already. Choose another, or continue it with: {again}")
    return True


def _unusable(path: Path, reason: str | None) -> InputError:
    return InputError(f"output_dir: must be a folder that can be written to, got {path} ({reason}). Choose another.")


def environment() -> dict[str, Any]:
    """Versions and machine, for the record."""
    import torch  # which reading a run needs not wait for

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
        "peak_memory": memory.how_measured(),
        "heap": heap.how_set(),
        "processes": launched(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": versions,
    }
