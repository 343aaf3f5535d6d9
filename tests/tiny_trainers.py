"""Every trainer under test on a tiny problem of its own: a tokenizer of ten words, one layer of width 16.

A further trainer is a further row of `SUPERVISED`: (folder, SPSA's options, config's options) -> trainer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from trl import (
    DPOConfig,
    DPOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from zopro import ESConfig, ESTrainer, ZOPrOConfig, ZOPrOTrainer, zeroth_order
from zopro.zo.directions import targeted

Build = Callable[..., Any]

WORDS = ("tea", "cake", "cup", "milk", "please", "thanks", "yes", "no", "two", "more")
PROMPTS = WORDS[:4]
PAIRS = [{"prompt": prompt, "chosen": " yes please", "rejected": " no thanks"} for prompt in PROMPTS]


def word_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **special)


TOKENIZER = word_tokenizer()
SIZES = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def llama(seed: int = 0, cls: type = LlamaForCausalLM, **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return cls(LlamaConfig(**{**SIZES, **options}))


def head_only(seed: int = 0) -> Any:
    """Only the output matrix is trained: 192 directions are few enough for a few steps of SPSA to show."""
    model = llama(seed).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    return model


def with_adapter(seed: int = 0, targets: Any = "all-linear", **options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(llama(seed, **options), LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 30,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": True,
        **options,
    }


def quiet(trainer: Any) -> Any:
    trainer.remove_callback(PrinterCallback)
    return trainer


def plain(folder: Path, zo: dict[str, Any], model: Any = None, **options: Any) -> Any:
    rows = [{"input_ids": ids, "labels": ids} for ids in TOKENIZER([f"{p} yes please" for p in PROMPTS])["input_ids"]]
    arguments = TrainingArguments(**settings(folder, **options))
    return quiet(zeroth_order(Trainer, **zo)(model or llama(), arguments, train_dataset=rows))


def sft(folder: Path, zo: dict[str, Any], model: Any = None, base: bool = False, **options: Any) -> Any:
    rows = Dataset.from_list([{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS])
    trainer_cls = SFTTrainer if base else zeroth_order(SFTTrainer, **zo)
    data = {"train_dataset": rows, "eval_dataset": rows, "processing_class": TOKENIZER}
    return quiet(trainer_cls(model or llama(), SFTConfig(**settings(folder, **options)), **data))


def reward(folder: Path, zo: dict[str, Any], model: Any = None, base: bool = False, **options: Any) -> Any:
    model = model or llama(cls=LlamaForSequenceClassification, num_labels=1)
    trainer_cls = RewardTrainer if base else zeroth_order(RewardTrainer, **zo)
    data = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": TOKENIZER}
    return quiet(trainer_cls(model, RewardConfig(**settings(folder, **options)), **data))


def dpo(folder: Path, zo: dict[str, Any], model: Any = None, base: bool = False, **options: Any) -> Any:
    trainer_cls = DPOTrainer if base else zeroth_order(DPOTrainer, **zo)
    arguments = DPOConfig(**settings(folder, **{"learning_rate": 3e-2, **options}))
    data = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": TOKENIZER}
    return quiet(trainer_cls(model or with_adapter(), args=arguments, **data))


def tea(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward function: the share of "tea" among the answer's words; a tenth of them by chance."""
    return [text.split().count("tea") / max(1, len(text.split())) for text in completions]


class Killed(BaseException):
    """As a kill: no handler for errors may see it."""


def counting(asked: list[str], mortal: int = 0) -> Callable[..., list[float]]:
    """`tea`, which notes what it is asked, until it is killed."""

    def tea_counted(completions: list[str], **kwargs: Any) -> list[float]:
        if mortal and len(asked) == mortal:
            raise Killed
        asked.append(" ".join(completions))
        return tea(completions)

    return tea_counted


def online(trainer_cls: type, config_cls: type, folder: Path, options: dict[str, Any]) -> Any:
    model = options.pop("model", None) or head_only()
    names = ("previous_update", "reward_update", "reference", "advantage", "avoid", "reward_timeout", "engine", "kept")
    own_arguments = {name: options.pop(name) for name in names if name in options}
    own = {"num_generations": 8, "max_completion_length": 6, "beta": 0.0, "learning_rate": 0.1}
    sizes = {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 240}
    return quiet(
        trainer_cls(
            model,
            reward_funcs=options.pop("reward_funcs", tea),
            args=config_cls(**settings(folder, **{**own, **sizes, **options})),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            eval_dataset=Dataset.from_list([{"prompt": word} for word in WORDS] * 3),
            processing_class=TOKENIZER,
            **own_arguments,
        )
    )


def rloo(folder: Path, zo: dict[str, Any], **options: Any) -> Any:
    return online(zeroth_order(RLOOTrainer, **zo), RLOOConfig, folder, options)


def zopro(folder: Path, **options: Any) -> Any:
    return online(ZOPrOTrainer, ZOPrOConfig, folder, options)


def es(folder: Path, **options: Any) -> Any:
    """A population of 16 that answers 4 prompts, 16 answers a step and member less than the others have."""
    own = {"num_generations": 1, "per_device_train_batch_size": 4, "population": 16, "sigma": 0.1}
    return online(ESTrainer, ESConfig, folder, {**own, **options})


SUPERVISED: dict[str, Build] = {"Trainer": plain, "SFT": sft, "Reward": reward, "DPO": dpo}


def lines(trainer: Any) -> list[dict[str, Any]]:
    """The training log, a line a step."""
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mean_reward(trainer: Any) -> float:
    """Over 240 completions of 10 prompts, sampled by the trainer itself."""
    return trainer.evaluate()["eval_reward"]


def adapted() -> Any:
    """Wide enough for back-propagation to reach a reward of 0.98, with the settings of test_guided_trainer.

    On three kinds of layers: a step on all seven takes nearly twice as long.
    """
    model = llama(hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3)
    config = LoraConfig(r=8, target_modules=["v_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return get_peft_model(model, config)


def shares(monkeypatch: pytest.MonkeyPatch) -> set[float]:
    """The shares of the previous update in steps to come."""
    found: set[float] = set()
    share = targeted.target_share

    def noted(step: int, *rest: Any) -> float:
        found.add(round(share(step, *rest), 6))
        return share(step, *rest)

    monkeypatch.setattr(targeted, "target_share", noted)
    return found
