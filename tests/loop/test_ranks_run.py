"""`zopro run` on many processes: one writes, all step; a rank that crashes ends the job, and any number continues it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from many_ranks import Job, free_port, in_turn, launch, results
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

    if crash_at >= 0:
        SPSA.measure_by = crashing  # type: ignore[method-assign]
    no_report(pytest.MonkeyPatch())  # slow, and the same for any number
    return pipeline.run(config(folder, out, **{**OPTIONS, **options}), resume=resume, quiet=True)


def run_with(folder: Path, out: Path, options: dict[str, Any]) -> Any:
    return run(folder, out, **options)


def refused(folder: Path, options: dict[str, Any]) -> str:
    with pytest.raises(InputError) as error:
        run(folder, folder / "refused", **options)
    return str(error.value)


def refused_to(folder: Path, options: list[dict[str, Any]]) -> str:
    """With options for each rank."""
    return refused(folder, options[int(os.environ["RANK"])])


@dataclass(frozen=True)
class Runs:
    """What one process and two have run, in folders of `at`.

    Args:
        end: of a job of two whose last rank was killed: exit codes, and what the first one said.
        refused: what each of two ranks was told of prompts that cannot be shared.
        differ: what each was told where the second had another seed.
    """

    at: Path
    end: tuple[list[int | None], tuple[int, Any]]
    refused: list[str]
    differ: list[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs of one process and of two, that of two also with shared queries, and killed and resumed: `one`, `two`,
    `queries`, `again`. `killed` stays as it was."""
    folder = write_inputs(tmp_path_factory.mktemp("ranks"))
    ranks, answers = launch(run_with, 2, folder, folder / "killed", {"crash_at": 3})
    try:
        answer = answers.get(timeout=60)
        for rank in reversed(ranks):
            rank.join(60)
    finally:
        for rank in ranks:
            rank.kill()
    shutil.copytree(folder / "killed", folder / "again")
    results(run_with, 1, folder, folder / "one", {})
    jobs: dict[str, Job] = {
        "refused": (refused, (folder, {"prompts_per_step": 3})),
        "differ": (refused_to, (folder, [{}, {"rank_timeout": 5, "seed": 7}])),
        "two": (run_with, (folder, folder / "two", {})),
        "queries": (run_with, (folder, folder / "queries", {"parallel": "queries"})),
        "again": (run_with, (folder, folder / "again", {"resume": True})),
    }
    told = in_turn(2, jobs)
    return Runs(folder, ([rank.exitcode for rank in ranks], answer), told["refused"], told["differ"])


def gradients(run: Path) -> list[float]:
    steps = journal.read(run / "iterations" / "000" / "journal.jsonl").steps
    return [g for step in steps for g in step.record.projected_gradients]


def test_two_processes_do_what_one_does(runs: Runs) -> None:
    one, two = fingerprint(runs.at / "one"), fingerprint(runs.at / "two")
    assert one.keys() == two.keys()
    for name in ("sft/", "reward/000/"):
        same = [file for file in one if file.startswith(name)]
        assert same and all(one[file] == two[file] for file in same), f"{name}: first-order stages are one process's"
    assert len(gradients(runs.at / "one")) == 8
    assert gradients(runs.at / "two") == pytest.approx(gradients(runs.at / "one"), rel=1e-3, abs=1e-5)
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        assert (runs.at / "two" / name).exists()
    assert not list((runs.at / "two").glob("trainer/*/checkpoint*"))


def test_journal_and_summary_count_what_ranks_exchange(runs: Runs) -> None:
    steps = journal.read(runs.at / "two" / "iterations" / "000" / "journal.jsonl").steps
    assert steps[0].rows and steps[0].exchanged_bytes > steps[1].exchanged_bytes, "the noise floor is measured at first"
    assert all(0 < step.exchanged_bytes == steps[1].exchanged_bytes for step in steps[1:])
    summary = json.loads((runs.at / "two" / "summary.json").read_text())
    assert summary["processes"] == 2 and summary["exchanged_bytes_per_step"] == steps[1].exchanged_bytes
    alone = json.loads((runs.at / "one" / "summary.json").read_text())
    assert alone["processes"] == 1 and alone["exchanged_bytes_per_step"] == 0


def test_a_rank_that_crashes_ends_the_job(runs: Runs) -> None:
    (_, code), (number, answer) = runs.end
    assert code == -signal.SIGKILL
    assert number == 0 and isinstance(answer, Stopped) and "rank 0 has lost another one" in str(answer), answer
    assert ".cc:" not in str(answer), "where gloo's source is says nothing to a user"
    assert not (runs.at / "killed/policy/000").exists()
    assert (runs.at / "killed/trainer/policy-000/checkpoint-2").exists()


def test_any_number_continues(runs: Runs) -> None:
    assert fingerprint(runs.at / "again") == fingerprint(runs.at / "two"), "as many ranks end at the same bits"
    one, more = runs.at / "one", runs.at / "more"
    shutil.copytree(runs.at / "killed", more)
    results(run_with, 4, runs.at, more, {"resume": True})
    assert gradients(more) == pytest.approx(gradients(one), rel=1e-3, abs=1e-5)
    ours, theirs = (load_file(r / "policy/000/adapter_model.safetensors") for r in (more, one))
    start = load_file(one / "sft/adapter_model.safetensors")
    moved = sum(float((theirs[n] - start[n]).square().sum()) for n in start)
    apart = sum(float((theirs[n] - ours[n]).square().sum()) for n in start)
    assert apart < 1e-4 * moved


def test_shared_queries_give_one_process_s_policies_to_the_bit(runs: Runs) -> None:
    one, two = fingerprint(runs.at / "one"), fingerprint(runs.at / "queries")
    assert {k: v for k, v in two.items() if "journal" not in k} == {k: v for k, v in one.items() if "journal" not in k}
    assert gradients(runs.at / "queries") == gradients(runs.at / "one")


def test_prompts_that_cannot_be_shared_are_refused_before_anything_is_written(runs: Runs) -> None:
    said = "prompts_per_step: must be a multiple of the number of processes, 2, got 3"
    assert len(runs.refused) == 2 and all(line.startswith(said) for line in runs.refused)
    assert not (runs.at / "refused").exists()


def test_ranks_of_different_configurations_are_refused_before_anything_is_written(runs: Runs) -> None:
    """Each would draw directions of its own; those that say how work is done alone may differ."""
    line = "seed: must be the same for all processes, got 0 for rank 0 and 7 for rank 1. Start all of them with"
    assert [told.rpartition(" one ")[0] for told in runs.differ] == [line, line]
    assert not (runs.at / "refused").exists()


def test_torchrun_ends_when_a_rank_is_killed(runs: Runs) -> None:
    """As a user types it: the job ends, nothing half-written counts as finished, and the journal can be read."""
    out, path = runs.at / "torchrun", runs.at / "torchrun.yaml"
    settings = config(runs.at, out, **{**OPTIONS, "policy_steps": 500}).to_dict()
    path.write_text(yaml.safe_dump({**settings, "judge": "rouge"}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command += ["-m", "zopro", "run", str(path)]
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
