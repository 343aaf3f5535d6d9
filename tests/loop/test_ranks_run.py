"""`zopro run` on many processes: one writes, all step; a rank that crashes ends the job, and any number continues it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from many_ranks import free_port, launch, results
from one_run import no_report
from tiny_runs import config, fingerprint, write_inputs
from zopro.errors import InputError, Stopped
from zopro.loop import pipeline
from zopro.store import journal
from zopro.zo import SPSA

OPTIONS = {
    "iterations": 1,
    "warm_start": "spsa",
    "policy_steps": 4,
    "prompts_per_step": 4,
    "checkpoint_steps": 2,
    "eps": "1e-3",
    "queries": 2,
    "num_generations": 2,
    "eval_prompts": 4,
    "pair_prompts": 4,
}


def run(folder: Path, out: Path, resume: bool = False, crash_at: int = -1, **options: Any) -> Any:
    """The whole run on this rank; of many, the last one is killed before step `crash_at`."""
    rank, size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    measure = SPSA.measure_by

    def crashing(self: SPSA, *args: Any) -> Any:
        if rank == size - 1 > 0 and self.step_count == crash_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return measure(self, *args)

    SPSA.measure_by = crashing  # type: ignore[method-assign]
    no_report(pytest.MonkeyPatch())  # slow, and the same for any number
    return pipeline.run(config(folder, out, **{**OPTIONS, **options}), resume=resume, quiet=True)


def run_with(folder: Path, out: Path, options: dict[str, Any]) -> Any:
    return run(folder, out, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two, that of two also killed: `one`, `two`, `killed`."""
    folder = write_inputs(tmp_path_factory.mktemp("ranks"))
    results(run_with, 1, folder, folder / "one", {})
    results(run_with, 2, folder, folder / "two", {})
    return folder


def gradients(run: Path) -> list[float]:
    steps = journal.read(run / "iterations" / "000" / "journal.jsonl").steps
    return [g for step in steps for g in step.record.projected_gradients]


def test_two_processes_do_what_one_does(runs: Path) -> None:
    one, two = fingerprint(runs / "one"), fingerprint(runs / "two")
    assert one.keys() == two.keys()
    for name in ("sft/", "reward/000/"):
        same = [file for file in one if file.startswith(name)]
        assert same and all(one[file] == two[file] for file in same), f"{name}: first-order stages are one process's"
    assert len(gradients(runs / "one")) == 8
    assert gradients(runs / "two") == pytest.approx(gradients(runs / "one"), rel=1e-3, abs=1e-5)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        assert (runs / "two" / name).exists()
    assert not list((runs / "two").glob("trainer/*/checkpoint*"))


def test_journal_and_summary_count_what_ranks_exchange(runs: Path) -> None:
    steps = journal.read(runs / "two" / "iterations" / "000" / "journal.jsonl").steps
    assert steps[0].rows and steps[0].exchanged_bytes > steps[1].exchanged_bytes, "the noise floor is measured at first"
    assert all(0 < step.exchanged_bytes == steps[1].exchanged_bytes for step in steps[1:])
    summary = json.loads((runs / "two" / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["exchanged_bytes_per_step"] == steps[1].exchanged_bytes
    alone = json.loads((runs / "one" / "summary.json").read_text())
    assert alone["processes"] == 1 and alone["exchanged_bytes_per_step"] == 0


def test_a_rank_that_crashes_ends_the_job_and_any_number_continues(runs: Path) -> None:
    killed = runs / "killed"
    ranks, answers = launch(run_with, 2, runs, killed, {"crash_at": 3})
    try:
        number, answer = answers.get(timeout=60)
        ranks[1].join(60)
        ranks[0].join(60)
    finally:
        for rank in ranks:
            rank.kill()
    assert ranks[1].exitcode == -signal.SIGKILL
    assert number == 0 and isinstance(answer, Stopped) and "rank 0 has lost another one" in str(answer), answer
    assert not (killed / "policy" / "000").exists()
    assert (killed / "trainer" / "policy-000" / "checkpoint-2").exists()

    shutil.copytree(killed, runs / "more")
    results(run_with, 2, runs, killed, {"resume": True})
    assert fingerprint(killed) == fingerprint(runs / "two"), "as many ranks end at the same bits"

    results(run_with, 4, runs, runs / "more", {"resume": True})
    assert gradients(runs / "more") == pytest.approx(gradients(runs / "one"), rel=1e-3, abs=1e-5)
    ours, theirs = (load_file(r / "policy/000/adapter_model.safetensors") for r in (runs / "more", runs / "one"))
    start = load_file(runs / "one" / "sft/adapter_model.safetensors")
    moved = sum(float((theirs[n] - start[n]).square().sum()) for n in start)
    apart = sum(float((theirs[n] - ours[n]).square().sum()) for n in start)
    assert apart < 1e-4 * moved


def test_shared_queries_give_one_process_s_policies_to_the_bit(runs: Path) -> None:
    results(run_with, 2, runs, runs / "queries", {"parallel": "queries"})
    one, two = fingerprint(runs / "one"), fingerprint(runs / "queries")
    assert {k: v for k, v in two.items() if "journal" not in k} == {k: v for k, v in one.items() if "journal" not in k}
    assert gradients(runs / "queries") == gradients(runs / "one")


def refused(folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        run(folder, folder / "refused", **options)
    return str(error.value)


def test_prompts_that_cannot_be_shared_are_refused_before_anything_is_written(runs: Path) -> None:
    said = results(refused, 2, runs, {"prompts_per_step": 3})
    assert all(
        line.startswith("prompts_per_step: must be a multiple of the number of processes, 2, got 3") for line in said
    )
    assert not (runs / "refused").exists()


def test_torchrun_ends_when_a_rank_is_killed(runs: Path) -> None:
    """As a user types it: the job ends, nothing half-written counts as finished, and the journal can be read."""
    out = runs / "torchrun"
    settings = config(runs, out, **{**OPTIONS, "policy_steps": 500}).to_dict()
    (runs / "torchrun.yaml").write_text(yaml.safe_dump({**settings, "judge": "rouge"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "zopro", "run", str(runs / "torchrun.yaml")]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True) as job:
        lines = out / "iterations" / "000" / "journal.jsonl"
        deadline = time.monotonic() + 120
        while not (lines.exists() and lines.read_bytes().count(b"\n") > 3):
            assert job.poll() is None and time.monotonic() < deadline, "the run must get to its first steps"
            time.sleep(0.1)
        workers = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        workers[0].kill()
        said = job.communicate(timeout=60)[1]
    assert job.returncode != 0
    assert "Signal 9" in said or "rank 0 has lost another one" in said
    assert not (out / "policy" / "000").exists()
    assert len(journal.read(lines).steps) > 2
