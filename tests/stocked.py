"""What the code blocks of README, docs and examples name: models, rows, configurations, and names of Python."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from blocks import Block
from tiny import tiny_model, tiny_tokenizer
from zopro.demo.model import CHAT_TEMPLATE

ROOT = Path(__file__).parents[1]
ROWS = 24  # of every data set that is made
SHORT = {
    "iterations": 1, "policy_steps": 1, "sft_steps": 1, "sft_batch_size": 2, "reward_steps": 1, "reward_batch_size": 2,
    "refine_steps": 1, "pair_prompts": 2, "eval_prompts": 2, "eval_samples": 1, "prompts_per_step": 2, "population": 2,
    "num_generations": 2, "max_completion_length": 8, "max_prompt_length": 200, "dtype": "float32",
    "max_train_rows": ROWS, "easy_questions": False, "eps": 1e-3,
}  # fmt: skip
"""Settings of every configuration here, where it has them or they are needed to be quick."""

ANSWERED = ("translations.jsonl", "summaries.jsonl", "other.jsonl")
"""Rows with a prompt and an answer."""

DATA: dict[str, Callable[[dict[str, str]], dict[str, Any]]] = {
    "hh_rlhf": lambda row: {
        which: f"\n\nHuman: {row['prompt']}\n\nAssistant: {row[which]}" for which in ("chosen", "rejected")
    },
    "scitldr": lambda row: {"source": [row["prompt"], row["rejected"]], "target": [row["chosen"]]},
    "wmt/wmt20_mlqe_task1:en-de": lambda row: {
        "translation": {"en": row["prompt"], "de": row["chosen"]}, "z_mean": len(row["chosen"]) % 7 / 5
    },
}  # fmt: skip
"""Folders of data sets, by their place or by their id on the Hub, and what each makes of a row."""

MODELS = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "gemma-3-270m",
    "my-model",
    "PATH",
)


def short(config: Path) -> None:
    """Fewer and shorter steps; everything else as it is."""
    values = yaml.safe_load(config.read_text("utf-8"))
    less = {key: value for key, value in SHORT.items() if key != "sft_steps" or values["task"] != "verifiable"}
    config.write_text(yaml.safe_dump(values | less, sort_keys=False), "utf-8")


def fill(folder: Path) -> dict[str, Any]:
    """Write models, rows, a short copy of examples and CONFIG.yaml; the configuration of RUN."""
    shipped = (ROOT / "src/zopro/tasks/shipped/chat.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in shipped]
    talk = [{key: row[key][-1]["content"] for key in ("prompt", "chosen", "rejected")} for row in rows]
    tokenizer = tiny_tokenizer([text for row in talk for text in row.values()], 3000, phrases=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    tiny_model("llama", tokenizer, num_hidden_layers=1, max_position_embeddings=512).save_pretrained(folder / "PATH")
    tokenizer.save_pretrained(folder / "PATH")
    for place, written in DATA.items():
        (folder / place).mkdir(parents=True)
        for name, part in (("train", talk[:32]), ("test" if place == "hh_rlhf" else "dev", talk[32:])):
            text = "".join(json.dumps(written(row)) + "\n" for row in part)
            if place == "hh_rlhf":
                (folder / f"{place}/{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
            else:
                (folder / f"{place}/{name}.jsonl").write_text(text)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    answered = [{"prompt": f"Once more: {row['prompt']}", "answer": row["chosen"]} for row in talk]
    for name in ANSWERED:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in answered))
    shutil.copytree(ROOT / "examples", folder / "examples")
    for example in (folder / "examples").glob("*.yaml"):
        short(example)
    config = {"model": "PATH", "task": "preference", "train_data": "rows.jsonl", "method": "zopro", "output_dir": "RUN",
              "judge": "rouge"} | SHORT | {"iterations": 2}  # fmt: skip
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(config))
    return config


def given(block: Block) -> dict[str, Any]:
    """What a block of Python names without making it."""
    folder = "PATH"
    bare = AutoModelForCausalLM.from_pretrained(folder)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    ids = torch.arange(3, 15).reshape(2, 6).repeat_interleave(2, 0)  # the same prompt twice
    names: dict[str, Any] = {
        "torch": torch,
        "rows": Dataset.from_list([json.loads(line) for line in Path("rows.jsonl").read_text().splitlines()[:4]]),
        "lora": lora,
        "reward": lambda completions, **columns: [float(len(completion)) for completion in completions],
        "loss_function": lambda model, batch: model(batch, labels=batch).loss,
        "rewards_of": lambda model: [1.0, 0.0],
        "batch": ids,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_length": 2,
        "K": 2,
        "old_logprobs": torch.zeros(4),
        "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5]),
        "model": bare if block.page.stem == "trainers" else get_peft_model(bare, lora),
    }
    return names
