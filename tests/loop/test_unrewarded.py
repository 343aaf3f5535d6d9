"""Evaluations with a reward that does not apply to every answer: None, which is a number of nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from one_run import no_report
from tiny_runs import config, write_inputs
from zopro import demo
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.correctness import reward_interval

PROMPTS = ("tea?", "cake?", "milk?", "bread?")


def patchy(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
    """Nothing for one answer a prompt, as greedy ones come, and of prompts with an "a" nothing."""
    alone = len(set(prompts)) == len(prompts)
    return [None if alone or "a" in p else 1 / (1 + len(c)) for p, c in zip(prompts, completions, strict=True)]


def test_what_has_no_reward_is_not_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_inputs(tmp_path / "inputs")
    for name in ("train", "eval"):
        asked = [{"prompt": f"{name[0]} {prompt}" if name == "train" else prompt} for prompt in PROMPTS]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    made = config(
        folder, tmp_path / "run", task="verifiable", reward=f"python:{__name__}:patchy", judge="auto", method="mezo",
        warm_start="spsa", sft_steps=0, iterations=1, eval_prompts=4, eval_samples=2, eval_greedy=True, num_generations=2,
        dtype="float32", **{f"{name}_data": str(tmp_path / f"{name}.jsonl") for name in ("train", "eval")},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        found = pipeline.run(made)
    said = capfd.readouterr().err
    assert re.search(r"policy 0: \d+ of \d+ answers have no reward \(None\): they take no part in their step", said)
    assert "All reward functions" not in said, "TRL's, with all columns of a row"
    before, after = found["evaluations"]
    assert before["n"] == after["n"] == 1, "milk alone"
    assert "4 held-out prompts  reward [95 %]" in demo.table(found)
    assert before["reward"] is not None and "greedy_reward" not in before and before["greedy_length"] >= 0
    assert after["win_rate"] in (0.0, 0.5, 1.0) and after["win_rate_high"] - after["win_rate_low"] > 0.6


def test_no_reward_at_all_says_what_to_do() -> None:
    with pytest.raises(InputError, match=r"gave None to all of them\. Let it score more\. Then continue with --resume"):
        reward_interval([{}], "reward", "sampled_reward")
