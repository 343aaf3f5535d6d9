"""Trainers of transformers and TRL on a batch of four rows, and the slope of their first step both ways."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments
from trl import (
    DistillationConfig,
    DistillationTrainer,
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from tiny_trainers import (
    PROMPTS,
    TOKENIZER,
    lines,
    llama,
    quiet,
    settings,
    with_adapter,
    word_tokenizer,
)
from zopro import zeroth_order
from zopro.weights.adapters import tensor_name

CONFIGS: dict[type, type] = {
    Trainer: TrainingArguments,
    SFTTrainer: SFTConfig,
    RewardTrainer: RewardConfig,
    DPOTrainer: DPOConfig,
    KTOTrainer: KTOConfig,
    RLOOTrainer: RLOOConfig,
    GRPOTrainer: GRPOConfig,
    DistillationTrainer: DistillationConfig,
}
ANSWERS = [
    {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for prompt, chosen, rejected in zip(
        PROMPTS,
        (" yes please", " two more cup", " milk", " tea thanks"),
        (" no", " no thanks", " cake no two", " no no"),
        strict=True,
    )
]
TOKENS = TOKENIZER(["tea yes please no", "milk no two thanks"] * 2)["input_ids"]
ONLY_PROMPTS = [{"prompt": prompt} for prompt in PROMPTS]
ROWS: dict[str, list[dict[str, Any]]] = {
    "Trainer": [{"input_ids": ids, "labels": ids} for ids in TOKENS],
    "SFTTrainer": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ANSWERS],
    "KTOTrainer": [
        {"prompt": row["prompt"], "completion": row[kind], "label": kind == "chosen"}
        for row, kind in zip(ANSWERS, ("chosen", "rejected") * 2, strict=True)
    ],
    "A2POTrainer": [{**row, "solution": "tea"} for row in ONLY_PROMPTS],  # a column that rewards get by its name
    "TPOTrainer": [{**row, "reference": row["chosen"]} for row in ANSWERS],
    "GKDTrainer": [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
        for row in ANSWERS
    ],
    **dict.fromkeys(("RewardTrainer", "DPOTrainer", "CPOTrainer", "ORPOTrainer"), ANSWERS),
}
SAMPLES = {"num_generations": 4, "max_completion_length": 5, "per_device_train_batch_size": 16}
OPTIONS: dict[str, dict[str, Any]] = {  # of configurations
    **dict.fromkeys(("RLOOTrainer", "GRPOTrainer", "GMPOTrainer"), SAMPLES),
    **{name: {"max_completion_length": 5} for name in ("DistillationTrainer", "A2POTrainer")},
    "GKDTrainer": {"lmbda": 0.0, "max_new_tokens": 4},
}
NEEDED: dict[tuple[str, Any], dict[str, Any]] = {  # options without which another one says nothing
    ("loss_type", "exo_pair"): {"label_smoothing": 0.1},
    ("loss_type", "robust"): {"label_smoothing": 0.1},
    ("f_divergence_type", "alpha_divergence"): {"f_alpha_divergence_coef": 0.5},
    ("loss_type", "simpo"): {"cpo_alpha": 0.0},
    ("use_bias_correction_kl", True): {"beta": 0.1},
    ("use_adaptive_entropy", True): {"entropy_coef": 0.1, "entropy_target": 10.0, "entropy_coef_delta": 0.05},
}


def policy(targets: Any = ("v_proj", "down_proj"), **options: Any) -> Any:
    """Adapters that have left the reference: at zero many losses are symmetric. Of two layers: all seven take longer."""
    model = with_adapter(initializer_range=0.5, targets=targets, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    return model


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that answers seldom share: the first rows that a check looks at have a slope."""
    return [len(text) / 10 for text in completions]


def classes(name: str) -> tuple[type, type]:
    """A trainer of transformers or TRL, and its configuration; skips where TRL has none of the name."""
    for trainer_cls, config_cls in CONFIGS.items():
        if trainer_cls.__name__ == name:
            return trainer_cls, config_cls
    kind = name.removesuffix("Trainer")
    module = pytest.importorskip(f"trl.experimental.{ {'OnlineDPO': 'online_dpo'}.get(kind, kind.lower()) }")
    return getattr(module, name), getattr(module, f"{kind}Config")


def build(trainer_cls: type, folder: Path, zo: dict[str, Any] | None = None, model: Any = None, **options: Any) -> Any:
    name, config_cls = trainer_cls.__name__, TrainingArguments
    data: dict[str, Any] = {"train_dataset": ROWS["Trainer"]}
    if trainer_cls.__module__.startswith("trl."):
        config_cls = classes(name)[1]
        data = {"processing_class": TOKENIZER, "train_dataset": Dataset.from_list(ROWS.get(name, ONLY_PROMPTS))}
    if name == "GKDTrainer":
        data["processing_class"] = word_tokenizer()
        data["processing_class"].chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    wanted = inspect.signature(trainer_cls).parameters
    if "reward_funcs" in wanted:
        data["reward_funcs"] = letters
    if "teacher_model" in wanted:
        data["teacher_model"] = llama(1)
    if model is None:
        model = llama(cls=LlamaForSequenceClassification, num_labels=1) if trainer_cls is RewardTrainer else policy()
    own = {"max_steps": 1, "learning_rate": 0.0, "per_device_train_batch_size": 4, **OPTIONS.get(name, {})}
    arguments = config_cls(**settings(folder, **{**own, **options}))
    given = {"eps": 1e-3, "second_moment_beta": None, **(zo or {})}
    return quiet(zeroth_order(trainer_cls, **given)(model, args=arguments, **data))


def slopes(trainer: Any) -> tuple[float, float]:
    """Of a training's first step: what it measured, and the base class's own loss by autograd on the same batch."""
    seen: list[Any] = []
    measured = trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append((model, dict(inputs), kwargs, dict(vars(trainer))))
        return measured(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    model, inputs, kwargs, state = seen[0]
    vars(trainer).update({**state, "_measuring": False})
    model.train()
    loss = next(cls for cls in type(trainer).__mro__[2:] if "compute_loss" in vars(cls)).compute_loss(
        trainer, model, inputs, **kwargs
    )
    named = [(tensor_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    z = [trainer.spsa.directions.tensor(name, p, trainer.spsa.seed, 0) for name, p in named]
    slope = sum(float((grad * along).sum()) for grad, along in zip(grads, z, strict=True) if grad is not None)
    return lines(trainer)[0]["projected_gradient"], slope


def token_logprobs(model: Any, inputs: Any) -> Tensor:
    """(rows, tokens - 1)"""
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    return logits.log_softmax(-1).gather(2, inputs["input_ids"][:, 1:, None]).squeeze(2)
