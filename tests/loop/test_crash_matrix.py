"""A small crash matrix: a real SIGKILL at three moments of one run of seconds, and one full disk."""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from pathlib import Path

from many_ranks import results
from scripts import FOLDER


def crash_matrix(words: list[str]) -> int:
    """The script's exit code. Its runs write to pipes: streams that were opened on a file would seek there."""
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.pipe()[1], number)  # unread: the few lines that the script itself writes fit into it
        setattr(sys, name, os.fdopen(number, "w", closefd=False))
    sys.path.insert(0, str(FOLDER))
    sys.argv = ["crash_matrix.py", *words]
    code: int = import_module("crash_matrix").main()
    return code


def test_every_crash_ends_in_the_same_bits(tmp_path: Path) -> None:
    steps = [f"{stage}_steps=3" for stage in ("sft", "reward", "policy", "refine")]
    rows = ["eval_prompts=4", "num_generations=2", "easy_questions=false", "max_completion_length=12"]
    rows += ["lora_target_modules=q_proj,down_proj"]
    size = ["--size", "tiny", "--set", "iterations=1", "warm_start=sft", "eps=1e-3", *steps, *rows]
    begun = [f"trainer/{stage}/checkpoint-*" for stage in ("sft", "reward", "policy-000")]
    words = [*size, "--kills", "0", "--at", *begun, "--crashes-per-run", "3"]
    words += ["--full-disks", "1", "--disk", "limit", "--no-report"]
    paths = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "trials.json")]
    (code,) = results(crash_matrix, 1, [*words, *paths])
    trials = json.loads((tmp_path / "trials.json").read_text())
    assert code == 0, json.dumps(trials, indent=1)
    assert [trial["kind"] for trial in trials] == ["killed"] * 3 + ["disk full"]
    assert all(trial["adapters"] and trial["lines"] and trial["resumed"] == 0 for trial in trials)
    stages = {trial["crashed_in"].removeprefix("after ").split()[0] for trial in trials[:3]}
    assert len(stages) > 2, "crashes in several stages"
