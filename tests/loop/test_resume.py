"""Runs that crash in the middle of every stage and go on to the bits of the run that was never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import zopro
from one_run import no_report
from tiny_runs import config, fingerprint, prefers_short
from zopro import cli
from zopro.config import RunConfig
from zopro.errors import InputError, Stopped
from zopro.loop import pipeline
from zopro.store.durable import append_line, disk_full, keep_lines, whole_folder, whole_lines, write_text
from zopro.store.lock import RunLock
from zopro.train.callbacks import MetricsCallback
from zopro.train.checkpoints import newest, save_arguments
from zopro.zo import Weights

STEPS = {
    "sft_steps": 4, "reward_steps": 4, "policy_steps": 4, "refine_steps": 4, "checkpoint_steps": 2,
    "eval_prompts": 2, "pair_prompts": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "adapter": {"snapshot_every": 2, "eps": ""},
    "full-paper-one-sided": {
        "lora_r": 0,
        "preset": "paper",
        "eps": "",
        "sides": 1,
        "queries": 2,
        "warm_start": "sft",
        "iterations": 1,
    },
}
ELSEWHERE = {"full-paper-one-sided": ("reward", "refine")}
"""Stages that are those of an adapter's run, whose crashes are tested there."""
VOLATILE = {"time", "seconds", "peak_rss_mb", "step_time"}


class Crashed(BaseException):
    """As a crash: no handler for errors may see it."""


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    no_report(monkeypatch)


def stages(settings: RunConfig, kind: str) -> list[tuple[str, int | None]]:
    loop = [(name, i) for i in range(settings.iterations) for name in ("policy", "refine")]
    every = [("sft", None), ("reward", None), *loop]
    return [stage for stage in every if stage[0] not in ELSEWHERE.get(kind, ())]


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics but for what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VOLATILE} for line in lines]


@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_in_every_stage_changes_no_bit(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full-parameter checkpoints of a zeroth-order stage hold no parameters: the journal does."""
    settings = config(folder, tmp_path / "whole", **STEPS, **KINDS[kind])
    pipeline.run(settings, quiet=True)
    again = replace(settings, output_dir=str(tmp_path / "again"))
    original, begun = MetricsCallback.on_log, []

    def mortal(self: Any, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        begun.append((self.stage, self.iteration, state.global_step))
        original(self, args, state, control, logs, **kwargs)
        if (self.stage, self.iteration) == doomed and state.global_step == 4:
            raise Crashed

    monkeypatch.setattr(MetricsCallback, "on_log", mortal)
    for number, doomed in enumerate(crashes := stages(settings, kind)):
        with pytest.raises(Crashed):
            pipeline.run(again, resume=number > 0, quiet=True)
        begun.clear()
        assert newest(tmp_path / "again/trainer" / _folder(*doomed))[0] == 2
    if settings.lora_r == 0:
        (checkpoint,) = (tmp_path / "again/trainer/policy-000").iterdir()
        assert checkpoint.name == "checkpoint-2"
        assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 30_000
        assert (tmp_path / "again/sft/model.safetensors").stat().st_size > 50_000
    doomed = None
    pipeline.run(again, resume=True, quiet=True)
    assert begun[0] == (*crashes[-1], 3), "it goes on after the checkpoint, not from the beginning"
    assert fingerprint(tmp_path / "again") == fingerprint(tmp_path / "whole")
    assert numbers(tmp_path / "again") == numbers(tmp_path / "whole"), "every step is counted once"
    assert not list((tmp_path / "again").rglob("*checkpoint*")) and not list((tmp_path / "again").rglob("*.partial"))
    assert json.loads((tmp_path / "again/summary.json").read_text())["reward_final"] is not None


def _folder(stage: str, iteration: int | None) -> str:
    return stage if iteration is None else f"{stage}-{iteration:03d}"


def test_a_demo_that_was_moved_goes_on_to_the_same_bits_and_numbers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its model and rows are in it, and its configuration says where they were."""
    monkeypatch.setattr(prefers_short, "in_summary", lambda rows: {"truth": len(rows)}, raising=False)
    made, moved = tmp_path / "made", tmp_path / "moved"
    shutil.copytree(folder, made / "demo")
    settings = config(made / "demo", made, iterations=1, policy_steps=1)
    before = pipeline.run(settings, quiet=True)["evaluations"]
    bits = fingerprint(made)
    for lost in ("summary.json", "evaluations/000.json", "evaluations/000.jsonl"):
        (made / lost).unlink()
    made.rename(moved)
    run = zopro.run(moved / "config.yaml", resume=True, quiet=True)
    assert yaml.safe_load((moved / "config.yaml").read_text())["output_dir"] == str(moved)
    assert run.path == moved and fingerprint(moved) == bits
    assert run.summary["evaluations"] == before and before[0]["truth"] == 6
    assert len(run.generate("tea or cake?", max_new_tokens=2)) == 1


def test_checkpoints_fall_between_log_lines() -> None:
    assert save_arguments(0) == {"save_strategy": "no"}
    assert save_arguments(10, logging_steps=3)["save_steps"] == 12


def test_a_full_disk_ends_the_run_with_one_line_and_it_resumes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real limit of the kernel's, on the size of files, at the third step of SPSA."""
    options = {"policy_steps": 4, "checkpoint_steps": 2, "warm_start": "spsa", "iterations": 1}
    settings = config(folder, tmp_path / "run", **options)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings.to_dict()))
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    original = Weights.apply

    def full(self: Any, record: Any) -> None:
        original(self, record)
        if record.step == 2:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "apply", full)
        capsys.readouterr()
        assert cli.main(["run", str(tmp_path / "config.yaml")]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("zopro: stopped: the disk is full") and "No space left on device" in last
    assert f"zopro run {tmp_path}/run/config.yaml --resume" in last
    assert cli.main(["run", str(tmp_path / "run/config.yaml"), "--resume"]) == 0
    pipeline.run(replace(settings, output_dir=str(tmp_path / "whole")), quiet=True)
    assert fingerprint(tmp_path / "run") == fingerprint(tmp_path / "whole")


def test_what_a_full_disk_makes_libraries_raise_is_recognised(tmp_path: Path) -> None:
    """By the kernel's own limit on the size of a file, for every writer in use."""
    code = f"""
import resource, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from zopro.store.durable import append_line, disk_full, write_text
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
big = torch.zeros(100_000)
folder = Path({str(tmp_path)!r})
for write in (
    lambda: torch.save({{"a": big}}, folder / "a"),
    lambda: save_file({{"a": big}}, folder / "b"),
    lambda: write_text(folder / "c", "x" * 100_000),
    lambda: append_line(folder / "d", "x" * 100_000),
):
    try:
        write()
    except Exception as error:
        assert disk_full(error) is not None, repr(error)
    else:
        raise SystemExit("the limit was not felt")
assert not (folder / "c").exists() and (folder / "d").read_bytes() == b""
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert disk_full(ValueError("os error 28")) is None and disk_full(None) is None
    for said in ("basic_ios::clear: iostream error", "ios_base::clear: unspecified iostream_category error"):
        assert disk_full(RuntimeError(said)) is not None, "torch, as it closes a file"
    wrapped = RuntimeError("a library's own words")
    wrapped.__cause__ = OSError(122, "Disk quota exceeded")
    assert disk_full(wrapped) is wrapped.__cause__


def test_a_second_process_is_refused_and_a_dead_one_is_not_missed(tmp_path: Path) -> None:
    code = "from pathlib import Path; from zopro.store.lock import RunLock; import time; "
    code += f"lock = RunLock(Path({str(tmp_path)!r})); lock.acquire(); print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=rf"used by one process at a time, .* process {other.pid} on "):
        RunLock(tmp_path).acquire()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    other.stdout.close()
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    for lock in (first, second):
        lock.acquire()
        lock.acquire()
    first.release()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"process {os.getpid()}" in done.stderr, "one of two holders in this process has it still"
    second.release()


def test_a_run_in_progress_is_refused_before_anything_is_loaded(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    settings, _ = finished
    code = (
        f"from pathlib import Path; from zopro.store.lock import RunLock; import sys\n"
        f"lock = RunLock(Path({settings.output_dir!r})); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    began = time.monotonic()
    with pytest.raises(InputError, match="used by one process at a time"):
        pipeline.run(settings, resume=True, quiet=True)
    assert time.monotonic() - began < 5
    other.communicate("")


def test_a_run_keeps_its_number_of_threads(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished[0].output_dir, tmp_path / "run")
    settings = replace(finished[0], output_dir=str(tmp_path / "run"))
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    (tmp_path / "run/environment.json").write_text(json.dumps({**environment, "threads": 3}))
    seen: list[int] = []
    monkeypatch.setattr(pipeline, "_loop", lambda *given: seen.append(torch.get_num_threads()) or {})
    before = torch.get_num_threads()
    pipeline.run(settings, resume=True, quiet=True)
    assert seen == [3] and torch.get_num_threads() == before


def test_a_growing_file_is_fixed(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for line in ("one", "two", "three"):
        append_line(path, line)
    with path.open("ab") as stream:
        stream.write(b"fo")
    assert whole_lines(path) == [b"one", b"two", b"three"]
    keep_lines(path, 2)
    assert path.read_bytes() == b"one\ntwo\n"


def test_files_and_folders_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "a/text", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_text(tmp_path / "a/text", "new")
        with pytest.raises(OSError, match="No space"), whole_folder(tmp_path / "b") as partial:
            (partial / "file").write_text("x")
    assert (tmp_path / "a/text").read_text() == "old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "text"]


def test_stopped_is_no_bad_input() -> None:
    assert not issubclass(Stopped, InputError)
