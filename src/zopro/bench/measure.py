"""Seconds of policy steps by phase, with the floor of bare forward passes measured between them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from zopro.bench.clock import Watch
from zopro.bench.floor import floor_passes
from zopro.bench.work import Setting
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.targets import new_adapter
from zopro.rewards import RewardModel
from zopro.system.random_state import preserve_random_state
from zopro.text.frame import plain_frame
from zopro.train.arguments import policy_arguments
from zopro.train.zopro import ZOPrOConfig, ZOPrOTrainer

PHASES = ("rollout", "scoring", "reference", "log-probs", "perturb", "update")
SPANS = {"log-probs": "reference", "loss/log-probs": "log-probs", "loss": "perturb"}
"""Spans of the trainer whose phases have other names: log-probs outside of the loss are the reference policy's."""
NO_TOKEN = -1  # as EOS: no completion ends early, so that every step has the same work


class _Steps(TrainerCallback):
    """Seconds of each step, and what to do after it (not timed)."""

    def __init__(self, clock: Watch, after: Callable[[], None]) -> None:
        self.clock, self.after = clock, after
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.take()
        self.start = self.clock.now()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.before_update = self.clock.now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.clock.seconds["update"] = self.clock.now() - self.before_update

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = self.clock.now() - self.start
        self.steps.append({SPANS.get(name, name): spent for name, spent in self.clock.take().items()} | {"total": total})
        self.after()


class _NoNoise(TrainerCallback):
    """The noise floor is measured once a run, and is no part of a step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"]).measure_noise = False


def step_trainer(setting: Setting, steps: int, folder: str, watch: Watch | None = None) -> ZOPrOTrainer:
    """Our trainer on this work, timed by `watch`."""
    work = setting.work
    arguments = ZOPrOConfig(
        **_arguments(setting, steps, folder),
        sides=work.sides,
        queries=work.queries,
        evaluation=work.evaluation,
        noise="" if work.directions == "targeted" else work.directions,
        eps=1e-3,
        learning_rate=1e-6,
    )
    generator = torch.Generator().manual_seed(work.seed)
    updates: dict[str, Any] = {}
    if work.directions == "targeted":
        updates = {
            which: {
                name: torch.randn(parameter.shape, generator=generator) * 1e-3
                for name, parameter in setting.policy.named_parameters()
                if parameter.requires_grad
            }
            for which in ("previous_update", "reward_update")
        }
    trainer: ZOPrOTrainer = _trainer(ZOPrOTrainer, arguments, setting, **updates)
    trainer.clock = watch
    if isinstance(trainer.engine, LocalEngine):
        trainer.engine.clock = watch
    trainer.add_callback(_NoNoise)
    return trainer


def peer_trainer(setting: Setting, steps: int, folder: str, checkpointing: bool, batching: bool = False) -> RLOOTrainer:
    """TRL's own trainer, first-order, on this work: its defaults, with or without gradient checkpointing.

    `batching`: it samples by transformers' continuous batching.
    """
    arguments = {**_arguments(setting, steps, folder), "gradient_checkpointing": checkpointing}
    if batching:
        arguments["use_transformers_continuous_batching"] = True
    return _trainer(RLOOTrainer, RLOOConfig(**arguments, learning_rate=1e-6), setting)


def _arguments(setting: Setting, steps: int, folder: str) -> dict[str, Any]:
    work = setting.work
    return policy_arguments(
        output_dir=folder,
        steps=steps,
        seed=work.seed,
        device=setting.policy.device,
        logging_steps=steps + 1,  # no line is part of a step
        prompts=work.prompts,
        num_generations=work.num_generations,
        max_completion_length=work.completion_length,
        temperature=1.0,
        beta=work.beta,
    )


def _trainer(trainer_cls: Any, arguments: Any, setting: Setting, **extra: Any) -> Any:
    options = replace(setting.work, lora_r=setting.work.lora_r or 8).model_options()  # one in full-parameter mode too
    longest = max(map(len, setting.prompt_ids)) + setting.work.completion_length + 1
    with preserve_random_state():
        torch.manual_seed(setting.work.seed)
        classifier = new_adapter(setting.classifier, options, "SEQ_CLS")
        reward_model = RewardModel(classifier, setting.tokenizer, longest, plain_frame(setting.tokenizer))
    trainer = trainer_cls(
        model=setting.policy,
        reward_funcs=reward_model.as_reward_function(len(setting.prompts) * setting.work.num_generations),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": setting.prompts}),
        processing_class=setting.tokenizer,
        **extra,
    )
    trainer.eos_token_ids = [NO_TOKEN]
    trainer.generation_config.eos_token_id = None
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    return trainer


def measure_step(setting: Setting) -> dict[str, Any]:
    """Medians over `steps` policy steps after one to warm up: step_s, phases, floor_s, floor_phases, floor_ratio."""
    work = setting.work
    floors: list[dict[str, float]] = []
    watch = Watch(setting.policy.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_trainer(setting, work.steps + 1, folder, watch)
        passes = floor_passes(setting)
        steps = _Steps(watch, lambda: floors.append(passes(watch)))
        trainer.add_callback(steps)
        trainer.train()
    measured, bare = steps.steps[1:], floors[1:]
    step_s = median(step["total"] for step in measured)
    floor_s = median(sum(floor.values()) for floor in bare)
    phases = {name: median(step.get(name, 0.0) for step in measured) for name in PHASES}
    phases["other"] = median(step["total"] - sum(step.get(name, 0.0) for name in PHASES) for step in measured)
    return {
        "step_s": step_s,
        "floor_s": floor_s,
        "floor_ratio": median(step["total"] / sum(floor.values()) for step, floor in zip(measured, bare, strict=True)),
        "phases": phases,
        "floor_phases": {name: median(floor[name] for floor in bare) for name in bare[0]},
    }


def measure_peer(setting: Setting, checkpointing: bool, batching: bool = False) -> dict[str, float]:
    """Median seconds of TRL's step after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Trainer = peer_trainer(setting, setting.work.steps + 1, folder, checkpointing, batching)
        steps = _Steps(Watch(trainer.accelerator.device), lambda: None)
        trainer.add_callback(steps)
        trainer.train()
    return {"step_s": median(step["total"] for step in steps.steps[1:])}
