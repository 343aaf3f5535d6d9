"""Seconds of policy steps by phase, with the floor of bare forward passes measured between them."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from zopro.bench.floor import floor_passes
from zopro.bench.work import Setting, adapter_options
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.targets import new_adapter
from zopro.rewards import RewardModel
from zopro.system.launch import launched
from zopro.system.random_state import preserve_random_state
from zopro.text.frame import plain_frame
from zopro.train.zopro import ZOPrOConfig, ZOPrOTrainer

PHASES = ("rollout", "scoring", "reference", "log-probs", "perturb", "update")
NO_TOKEN = -1  # as EOS: no completion ends early, so that every step has the same work


class Clock:
    """Seconds by name; a CUDA device is waited for at both ends of a span."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.seconds[name] += self.now() - start

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


class _Steps(TrainerCallback):
    """Seconds of each step, and what to do after it (not timed)."""

    def __init__(self, clock: Clock, after: Callable[[], None]) -> None:
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
        self.steps.append({**self.clock.take(), "total": total})
        self.after()


class TimedTrainer(ZOPrOTrainer):
    """ZOPrOTrainer that says where its seconds go."""

    clock: Clock

    def spsa_arguments(self) -> dict[str, Any]:
        return {**super().spsa_arguments(), "measure_noise": False}  # once a run, not once a step

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        with self.clock.span("rollout"):
            return super()._generate_single_turn(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock.span("scoring"):
            return super()._calculate_rewards(*args, **kwargs)

    def _logprobs(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock.span("reference"):
            return super()._logprobs(*args, **kwargs)

    def _estimate(self, *args: Any, **kwargs: Any) -> Any:
        start, inside = self.clock.now(), self.clock.seconds["log-probs"]
        try:
            return super()._estimate(*args, **kwargs)
        finally:
            self.clock.seconds["perturb"] += self.clock.now() - start - (self.clock.seconds["log-probs"] - inside)


class TimedEngine(LocalEngine):
    """The trainer's engine, whose displaced passes are timed."""

    clock: Clock

    def score(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.clock.span("log-probs"):
            return super().score(*args, **kwargs)


def step_trainer(setting: Setting, steps: int, folder: str) -> TimedTrainer:
    """Our trainer on this work, its clock running."""
    work = setting.work
    arguments = ZOPrOConfig(
        **_arguments(setting, steps, folder),
        sides=work.sides,
        queries=work.queries,
        evaluation=work.evaluation,
        noise=None if work.directions == "targeted" else work.directions,
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
    trainer: TimedTrainer = _trainer(TimedTrainer, arguments, setting, **updates)
    policy, autocast = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.autocast
    engine = TimedEngine(policy, autocast=autocast)
    trainer.engine, trainer.clock = engine, Clock(trainer.accelerator.device)
    engine.clock = trainer.clock
    return trainer


def peer_trainer(setting: Setting, steps: int, folder: str, checkpointing: bool) -> RLOOTrainer:
    """TRL's own trainer, first-order, on this work: its defaults, with or without gradient checkpointing."""
    arguments = RLOOConfig(**_arguments(setting, steps, folder), gradient_checkpointing=checkpointing, learning_rate=1e-6)
    return _trainer(RLOOTrainer, arguments, setting)


def _arguments(setting: Setting, steps: int, folder: str) -> dict[str, Any]:
    work, device = setting.work, setting.policy.device
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": work.prompts * work.num_generations // launched(),
        "num_generations": work.num_generations,
        "max_completion_length": work.completion_length,
        "beta": work.beta,
        "seed": work.seed,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type != "cpu",
        "dataloader_num_workers": 0,
    }


def _trainer(trainer_cls: Any, arguments: Any, setting: Setting, **extra: Any) -> Any:
    options = adapter_options(setting.work)
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
    with tempfile.TemporaryDirectory() as folder:
        trainer = step_trainer(setting, work.steps + 1, folder)
        passes = floor_passes(setting)
        steps = _Steps(trainer.clock, lambda: floors.append(passes(trainer.clock)))
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


def measure_peer(setting: Setting, checkpointing: bool) -> dict[str, float]:
    """Median seconds of TRL's step after one to warm up."""
    with tempfile.TemporaryDirectory() as folder:
        trainer: Trainer = peer_trainer(setting, setting.work.steps + 1, folder, checkpointing)
        steps = _Steps(Clock(trainer.accelerator.device), lambda: None)
        trainer.add_callback(steps)
        trainer.train()
    return {"step_s": median(step["total"] for step in steps.steps[1:])}
