"""A small crash matrix: a real SIGKILL at four moments of one run of seconds, and one full disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "crash_matrix.py"


def test_every_crash_ends_in_the_same_bits(tmp_path: Path) -> None:
    size = ["--size", "tiny", "--set", "iterations=1", "warm_start=sft", "max_completion_length=16", "eps=1e-3"]
    begun = [f"trainer/{stage}/checkpoint-*" for stage in ("sft", "reward", "policy-000", "refine-000")]
    words = [*size, "--kills", "0", "--at", *begun, "--crashes-per-run", "4"]
    words += ["--full-disks", "1", "--disk", "limit", "--no-report"]
    paths = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "trials.json")]
    done = subprocess.run([sys.executable, str(SCRIPT), *words, *paths], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "5 of 5 passed" in done.stdout
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert [trial["kind"] for trial in trials] == ["killed"] * 4 + ["disk full"]
    assert all(trial["adapters"] and trial["lines"] and trial["resumed"] == 0 for trial in trials)
    stages = {trial["crashed_in"].removeprefix("after ").split()[0] for trial in trials[:4]}
    assert len(stages) > 2, "crashes in several stages"
