"""How one policy iteration is optimised: a registry of methods, each a function from its inputs to a trainer.

A further method (PPO, online DPO, guided directions) is one more row here; the loop does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import RLOOConfig

from zopro.checkpoints import checkpointed, save_arguments
from zopro.config import RunConfig
from zopro.rloo import EngineRLOOTrainer
from zopro.trainer import ZOPrOConfig, ZOPrOTrainer

LEARNING_RATES = {"default": 1e-4, "paper": 1.0}  # of the presets; the paper's is relative to |mu|


@dataclass(frozen=True)
class PolicyInputs:
    """What a method gets: everything about one policy iteration."""

    model: Any  # the policy, a PeftModel or (full-parameter) a PreTrainedModel
    tokenizer: Any
    reward_function: Callable[..., list[float]]
    prompts: list[str]
    steps: int
    seed: int
    folder: Path  # the trainer's: checkpoints, logs of report_to
    config: RunConfig
    callbacks: list[Any] = field(default_factory=list)
    previous_update: Mapping[str, Tensor] = field(default_factory=dict)  # mu
    reward_update: Mapping[str, Tensor] = field(default_factory=dict)  # v
    rows: list[int] = field(default_factory=list)  # of the data, as the journal names them: one for each prompt
    reference: Mapping[str, Tensor] | None = None  # the SFT adapter; None: the model folder named in its config


Method = Callable[[PolicyInputs], Trainer]


def _arguments(inputs: PolicyInputs) -> dict[str, Any]:
    config = inputs.config
    return {
        "output_dir": str(inputs.folder),
        "max_steps": inputs.steps,
        "per_device_train_batch_size": config.prompts_per_step * config.num_generations,
        "num_generations": config.num_generations,
        "max_completion_length": config.max_completion_length,
        "temperature": config.temperature,
        "beta": config.beta,
        "seed": inputs.seed,
        "logging_steps": 1,
        **save_arguments(config.checkpoint_steps),
        "report_to": config.report_to,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": inputs.model.device.type == "cpu",
        "dataloader_pin_memory": inputs.model.device.type != "cpu",
    }


def _trainer(trainer_cls: type, arguments: Any, inputs: PolicyInputs, **extra: Any) -> Trainer:
    return checkpointed(trainer_cls)(
        model=inputs.model,
        reward_funcs=inputs.reward_function,
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": inputs.prompts, **({"row": inputs.rows} if inputs.rows else {})}),
        processing_class=inputs.tokenizer,
        callbacks=inputs.callbacks,
        reference=inputs.reference,
        **extra,
    )


def first_order(inputs: PolicyInputs) -> Trainer:
    """RLOO with back-propagation and AdamW."""
    arguments = RLOOConfig(**_arguments(inputs), learning_rate=inputs.config.first_order_learning_rate)
    return _trainer(EngineRLOOTrainer, arguments, inputs)


def _zeroth_order(inputs: PolicyInputs, targeted: bool) -> Trainer:
    config = inputs.config
    arguments = ZOPrOConfig(
        **_arguments(inputs),
        learning_rate=config.learning_rate or LEARNING_RATES[config.preset],
        lr_scheduler_type="constant",
        preset=config.preset,
        eps=float(config.eps) if config.eps not in ("", "auto") else (config.eps or None),
        queries=config.queries,
        sides=config.sides,
        surrogate=config.surrogate or None,
        decay=config.decay,
        weight_decay=config.weight_decay,
    )
    updates = {"previous_update": inputs.previous_update, "reward_update": inputs.reward_update} if targeted else {}
    return _trainer(ZOPrOTrainer, arguments, inputs, **updates)


METHODS: dict[str, Method] = {
    "zopro": partial(_zeroth_order, targeted=True),
    "mezo": partial(_zeroth_order, targeted=False),
    "rloo": first_order,
}
