"""Whole runs on a tiny model, for all tests: model and data, a configuration, what must be reproduced."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

from tiny import tiny_model, tiny_tokenizer
from zopro.config import RunConfig

NAMES = ("tea", "cake", "cup", "bread", "salt", "milk", "egg", "plum")


def rows() -> list[dict[str, str]]:
    return [
        {"prompt": f"{a} or {b}?", "chosen": f"{a}, please", "rejected": f"no {b}"}
        for a in NAMES
        for b in NAMES
        if a != b
    ]


def prefers_short(prompts: list[str], completions: list[list[str]], references: list[str | None]) -> list[int]:
    """A judge: the shorter answer wins."""
    return [-1 if len(a) == len(b) else int(len(b) < len(a)) for a, b in completions]


CALLS: list[int] = []
FIXED = threading.Event()


def gets_stuck(prompts: list[str], completions: list[list[str]], references: list[str | None]) -> list[int]:
    """`prefers_short`, which does not come back from its third call until it is fixed."""
    CALLS.append(len(prompts))
    if len(CALLS) == 3:
        FIXED.wait(60)
    return prefers_short(prompts, completions, references)


def never_decides(prompts: list[str], completions: list[list[str]], references: list[str | None]) -> list[int]:
    return [-1] * len(prompts)


def write_inputs(folder: Path, layers: int = 1, kind: str = "llama") -> Path:
    """Write `folder`/model, whose one layer halves the time of a run, and `folder`/rows.jsonl."""
    texts = [text for row in rows() for text in row.values()]
    tokenizer = tiny_tokenizer(texts)
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tiny_model(kind, tokenizer, num_hidden_layers=layers).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


def config(folder: Path, out: Path, **options: Any) -> RunConfig:
    """A run of a second or two. Adapters on all seven kinds of layers would take it a quarter longer, as choosing eps
    would: tests that are about those say `lora_target_modules="all-linear"` and `eps=""`."""
    settings: dict[str, Any] = {
        "model": str(folder / "model"),
        "task": "preference",
        "train_data": str(folder / "rows.jsonl"),
        "output_dir": str(out),
        "judge": f"python:{__name__}:prefers_short",
        "device": "cpu",
        "max_prompt_length": 48,
        "max_completion_length": 8,
        "lora_r": 4,
        "lora_target_modules": "q_proj,down_proj",
        "iterations": 2,
        "sft_steps": 2,
        "sft_batch_size": 4,
        "reward_steps": 2,
        "reward_batch_size": 4,
        "refine_steps": 1,
        "policy_steps": 2,
        "prompts_per_step": 2,
        "pair_prompts": 6,
        "eval_prompts": 6,
        "eval_batch_size": 4,
        "eps": 1e-3,
    }
    return RunConfig(**{**settings, **options})


def fingerprint(run: Path) -> dict[str, str]:
    """Hash of every file that a resumed run must reproduce."""
    files = [*run.rglob("*.safetensors"), *run.glob("iterations/*/*.jsonl"), *run.glob("evaluations/*.jsonl")]
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
