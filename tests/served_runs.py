"""A tiny run of es with a reward of its own, for engines that serve: model, rows and configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny import tiny_model, tiny_tokenizer
from tiny_runs import NAMES
from zopro.config import RunConfig


def letters(completions: list[str], **columns: Any) -> list[float]:
    return [sum(c.isalpha() for c in text) / 20 for text in completions]


def model_and_rows(folder: Path) -> tuple[Any, Any]:
    """A model and its tokenizer, and rows.jsonl in `folder`."""
    rows = [{"prompt": f"{a} or {b}?"} for a in NAMES for b in NAMES if a != b]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer([f"{name}, please" for name in NAMES])
    return tiny_model("llama", tokenizer), tokenizer


def settings(folder: Path, out: Path, **options: Any) -> RunConfig:
    mine: dict[str, Any] = {
        "task": "verifiable", "train_data": str(folder / "rows.jsonl"), "output_dir": str(out),
        "reward": f"python:{__name__}:letters", "method": "es", "population": 4, "sigma": 0.1, "prompts_per_step": 2,
        "eval_batch_size": 4, "eval_samples": 1, "eval_greedy": False, "lora_r": 4, "seed": 1, "checkpoint_steps": 1,
        "num_generations": 2,
    }  # fmt: skip
    return RunConfig(**{**mine, **options})
