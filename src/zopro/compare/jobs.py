"""One job of a comparison: prepares the shared work, measures inference, or trains a method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import SchedulerType, TrainerCallback

from zopro.compare.plan import Job
from zopro.config import RATE_KEYS, RunConfig
from zopro.engine.local.rollouts import Rollouts, generate
from zopro.loop.divergence import log_ratios, policy_logprobs
from zopro.loop.policy_stage import policy_trainer, train_policy
from zopro.loop.recording import Origin
from zopro.loop.session import Item, Session, batches, trimmed
from zopro.loop.stages import refine_reward, sample_pairs, train_reward, train_sft
from zopro.store.shown import PER_ANSWER
from zopro.system.memory import PeakMemory

INFERENCE_BATCHES = 3


def work(job: Job, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Do the job and return what result.json says."""
    session = Session(config, resume=(Path(config.output_dir) / "config.yaml").exists(), quiet=True)
    if job.kind == "prepare":
        return _prepare(session, job)
    if job.kind == "inference":
        return _inference(session, job)
    return _train(session, job, folder)


def _prepare(session: Session, job: Job) -> dict[str, Any]:
    directory = session.directory
    stages: list[tuple[Path, Any, tuple[int, ...]]] = [
        (directory.sft(), train_sft, ()),
        (directory.reward(0), train_reward, ()),
    ]
    if job.start == "iteration":
        stages += [
            (directory.policy(0), train_policy, (0,)),
            (directory.iteration(0) / "preferences.jsonl", sample_pairs, (0,)),
            (directory.reward(1), refine_reward, (0,)),
        ]
    for output, stage, arguments in stages:
        if not output.exists():
            stage(session, *arguments)
    return {"start": measure(session, start_folder(session, job), job), "rows": session.rows}


def start_folder(session: Session, job: Job) -> Path:
    """The policy that every training starts from."""
    return session.directory.sft() if job.start == "sft" else session.directory.policy(0)


def _inference(session: Session, job: Job) -> dict[str, Any]:
    """Peak memory of sampling a step's batch, in a process that holds all that training holds but does not train."""
    config = session.config
    items = training_items(session)
    untrained = replace(job, method="mezo", steps=1)
    with job_trainer(session, untrained, config, session.directory.trainer("inference")) as (_, model):
        memory = PeakMemory(session.base.device)
        for number in range(INFERENCE_BATCHES):
            first = number * config.prompts_per_step
            batch = [items[(first + i) % len(items)] for i in range(config.prompts_per_step)]
            generate(
                model,
                [item.ids for item in batch],
                num_generations=config.num_generations,
                max_new_tokens=config.max_completion_length,
                eos_token_ids=session.eos_token_ids,
                pad_token_id=session.tokenizer.pad_token_id,
                temperature=config.temperature,
                generator=torch.Generator(session.base.device).manual_seed(number),
            )
        return {"peak_mb": memory.peak_mb()}


def search_items(session: Session) -> list[Item]:
    """Prompts for the choice of learning rates: training rows that no method trains on, where there are enough."""
    return session.train[-min(session.config.eval_prompts, max(1, len(session.train) // 4)) :]


def training_items(session: Session) -> list[Item]:
    """The prompts of the policy stage, the same for every method."""
    rest = session.train[: -len(search_items(session))]
    return rest or session.train


@contextmanager
def job_trainer(session: Session, job: Job, config: RunConfig, folder: Path) -> Iterator[tuple[Any, Any]]:
    """The method's trainer and its model, ready to train from the policy that all start from."""
    directory, policies = session.directory, session.policies
    sft, policy, reward = directory.sft(), directory.policy, directory.reward
    if job.start == "sft":
        before = Path(config.model) if policies.full else directory.initial()
        origin = Origin(directory.path, 0, job.method, sft, (sft, before))
    else:
        origin = Origin(directory.path, 1, job.method, policy(0), (policy(0), sft), (reward(1), reward(0)))
    items = training_items(session)
    chosen = [items[i % len(items)] for i in range(job.steps * config.prompts_per_step)]
    training: dict[str, Any] = {"steps": job.steps, "seed": job.seed, "folder": folder}
    with policy_trainer(session, origin, chosen, origin.iteration, config, **training) as (trainer, model):
        trainer.args.lr_scheduler_type = SchedulerType.CONSTANT  # a budget may end any training early
        yield trainer, model


def _train(session: Session, job: Job, folder: Path) -> dict[str, Any]:
    rate: dict[str, Any] = {RATE_KEYS.get(job.method, "learning_rate"): job.learning_rate}
    config = replace(session.config, method=job.method, checkpoint_steps=0, **rate)
    pace = Pace(job)
    with job_trainer(session, job, config, folder / "trainer") as (trainer, model):
        trainer.add_callback(pace)
        pace.save = lambda step: session.policies.save(model, folder / "points" / f"{step:06d}")
        memory = PeakMemory(session.base.device)
        trainer.train()
        peak = memory.peak_mb()
    points = [
        {"step": step, "seconds": seconds, **measure(session, folder / "points" / f"{step:06d}", job)}
        for step, seconds in pace.points
    ]
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return {"points": points, "steps": pace.steps, "seconds": pace.seconds, "peak_mb": peak, "training_reward": rewards}


class Pace(TrainerCallback):
    """Keeps the policy at the marks, stops at the budget, and tells the time of training alone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.save: Callable[[int], None] = lambda step: None
        self.marks = job.marks() if job.points else []
        self.points: list[tuple[int, float]] = []
        self.steps, self.seconds = 0, 0.0
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._since
        self.steps = state.global_step
        over = 0 < self.job.budget_seconds <= self.seconds
        if self.job.points and (state.global_step in self.marks or over):
            self.points.append((state.global_step, self.seconds))
            self.save(state.global_step)
        if over:
            control.should_training_stop = True
        self._since = time.perf_counter()


def measure(session: Session, policy: Path, job: Job) -> dict[str, list[float]]:
    """Rewards and log-ratios to the SFT policy, in nats, of one sampled answer to each held-out (or search) prompt."""
    config = session.config
    items: Sequence[Item] = session.eval if job.prompts == "test" else search_items(session)
    reward_model = session.reward_model(0 if job.start == "sft" else 1)
    rollouts: list[Rollouts] = []
    logprobs: list[torch.Tensor] = []
    with session.policies.open(policy) as model:
        for number, batch in enumerate(batches(items, config.eval_batch_size)):
            rollouts.append(session.sample(model, batch, session.seed("compare", job.prompts, job.seed) + number))
            logprobs.append(policy_logprobs(model, rollouts[-1], config.temperature))
    ids = [row for rollout in rollouts for row in trimmed(rollout)]
    rewards = reward_model.score([item.ids for item in items], ids, config.eval_batch_size)
    return {"rewards": rewards, PER_ANSWER: log_ratios(session, policy, rollouts, logprobs)}
