"""What a policy answers: sampled in batches, scored by a reward model, held against the SFT policy, judged in pairs.

`measure` is what evaluations and comparisons (`zopro.compare`) know a policy by.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from zopro.engine.local.rollouts import Rollouts, generate
from zopro.judges import JudgeResult, judge_pairs
from zopro.judges.verdicts import Verdicts
from zopro.loop.data import Item
from zopro.loop.divergence import log_ratios, policy_logprobs
from zopro.loop.models import Models
from zopro.loop.run import Run
from zopro.rewards import RewardModel

T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def sample(run: Run, models: Models, model: Any, items: Sequence[Item], seed: int, count: int = 1) -> Rollouts:
    """`count` completions of each item in one batch, drawn at the configured temperature."""
    return generate(
        model,
        [item.ids for item in items],
        num_generations=count,
        max_new_tokens=run.config.max_completion_length,
        eos_token_ids=models.eos_token_ids,
        pad_token_id=models.tokenizer.pad_token_id,
        temperature=run.config.temperature,
        generator=torch.Generator(models.base.device).manual_seed(seed),
    )


def sample_all(run: Run, models: Models, model: Any, items: Sequence[Item], seed: int) -> Iterator[Rollouts]:
    """One completion of each item, `eval_batch_size` items at a time, each batch by the seed after the last one's."""
    for number, batch in enumerate(batches(items, run.config.eval_batch_size)):
        yield sample(run, models, model, batch, seed + number)


def trimmed(rollout: Rollouts) -> list[list[int]]:
    """Completions as lists without padding, EOS kept."""
    lengths = rollout.completion_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)]


@dataclass(frozen=True)
class Measured:
    """Of one sampled answer to each item: token ids, reward, and log pi(answer) - log pi_SFT(answer) in nats."""

    ids: list[list[int]]
    rewards: list[float]
    log_ratios: list[float]


def measure(run: Run, models: Models, items: Sequence[Item], policy: Path, seed: int, reward: RewardModel) -> Measured:
    """Sample one answer to each item from the policy saved in `policy`, and measure it."""
    rollouts, logprobs = [], []
    with models.policies.open(policy) as model:
        for rollout in sample_all(run, models, model, items, seed):
            rollouts.append(rollout)
            logprobs.append(policy_logprobs(model, rollout, run.config.temperature))
    ids = [row for rollout in rollouts for row in trimmed(rollout)]
    rewards = reward.score([item.ids for item in items], ids, run.config.eval_batch_size)
    return Measured(ids, rewards, log_ratios(run, models, policy, rollouts, logprobs))


def ask_judge(
    run: Run,
    models: Models,
    stage: str,
    iteration: int | None,
    prompts: list[str],
    completions: list[list[str]],
    references: list[str | None],
) -> JudgeResult:
    """The configured judge's verdicts, which are kept on the disk until the stage is done."""
    verdicts = Verdicts(run.store.verdicts(stage, iteration))
    return judge_pairs(models.judge, prompts, completions, references, verdicts, batch_size=run.config.eval_batch_size)
