"""What a policy answers: sampled in batches, scored by a reward model, held against the SFT policy, judged in pairs.

`measure` is what evaluations and comparisons (`zopro.compare`) know a policy by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor

from zopro.engine import Rollouts
from zopro.engine.opening import generate
from zopro.judges import JudgeResult, judge_pairs
from zopro.judges.verdicts import Verdicts
from zopro.loop.data import Item
from zopro.loop.divergence import log_ratios, policy_logprobs
from zopro.loop.models import Models
from zopro.loop.rewarding import Rewards, Scores
from zopro.loop.run import Run
from zopro.system import progress

T = TypeVar("T")


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def sample(
    run: Run, models: Models, model: Any, items: Sequence[Item], seed: int, count: int = 1, greedy: bool = False
) -> Rollouts:
    """`count` completions of each item in one batch, drawn at the configured temperature or the likeliest tokens."""
    return generate(
        model,
        [item.ids for item in items],
        num_generations=count,
        max_new_tokens=run.config.max_completion_length,
        eos_token_ids=models.eos_token_ids,
        pad_token_id=models.tokenizer.pad_token_id,
        do_sample=not greedy,
        temperature=run.config.temperature,
        generator=torch.Generator(models.base.device).manual_seed(seed),
    )


def sample_all(
    run: Run, models: Models, model: Any, items: Sequence[Item], seed: int, count: int = 1, greedy: bool = False
) -> Iterator[Rollouts]:
    """`count` completions of each item, one item's after the other's, at most `eval_batch_size` at a time, each batch by
    the seed after the last one's."""
    size = run.config.eval_batch_size
    counts = [min(size, count - first) for first in range(0, count, size)]  # several for an item that is a batch itself
    asked = [(batch, part) for batch in batches(items, max(1, size // count)) for part in counts]
    for number, (batch, part) in enumerate(progress.counted(asked, "answering")):
        yield sample(run, models, model, batch, seed + number, part, greedy)


@dataclass(frozen=True)
class Measured:
    """Of `count` sampled answers to each item, one item's after the other's: token ids, scores, and log pi(answer) - log
    pi_SFT(answer) in nats. greedy: the ids of the likeliest answer to each item, if asked for, and their scores."""

    ids: list[list[int]]
    scores: Scores
    log_ratios: list[float]
    greedy: list[list[int]] = field(default_factory=list)
    greedy_scores: Scores | None = None


def measure(
    run: Run,
    models: Models,
    items: Sequence[Item],
    policy: Path,
    seed: int,
    rewards: Rewards,
    count: int = 1,
    greedy: bool = False,
    also: Callable[[Any], None] | None = None,
) -> Measured:
    """Sample `count` answers to each item from the policy saved in `policy`, and measure them; also the greedy one.

    `also` is handed the policy while it is open.
    """
    likeliest = []
    with models.policies.open(policy) as model:
        rollouts, logprobs = _drawn(run, models, model, items, seed, count)
        for rollout in sample_all(run, models, model, items, seed, greedy=True) if greedy else ():
            likeliest += rollout.answers()
        if also is not None:
            also(model)
    ids = [row for rollout in rollouts for row in rollout.answers()]
    asked = [item for item in items for _ in range(count)]
    scores = rewards.score(asked, ids)
    ratios = log_ratios(run, models, policy, rollouts, logprobs)
    return Measured(ids, scores, ratios, likeliest, rewards.score(items, likeliest) if greedy else None)


def divergences(run: Run, models: Models, items: Sequence[Item], policy: Path, seed: int) -> list[float]:
    """log pi(answer) - log pi_SFT(answer), in nats, of an answer to each item, sampled from the policy in `policy`."""
    if not items or policy == run.store.sft():
        return [0.0] * len(items)
    with models.policies.open(policy) as model:
        rollouts, logprobs = _drawn(run, models, model, items, seed, 1)
    return log_ratios(run, models, policy, rollouts, logprobs)


def _drawn(
    run: Run, models: Models, model: Any, items: Sequence[Item], seed: int, count: int
) -> tuple[list[Rollouts], list[Tensor]]:
    """`count` answers to each item by the open policy, in batches, and their log-probs."""
    rollouts, logprobs = [], []
    for rollout in sample_all(run, models, model, items, seed, count):
        rollouts.append(rollout)
        logprobs.append(policy_logprobs(model, rollout, run.config.temperature))
    return rollouts, logprobs


def ends(models: Models, ids: Sequence[Sequence[int]]) -> list[bool]:
    """Which completions end by themselves, within the limit."""
    return [bool(row) and row[-1] in models.frame.stops for row in ids]


def ended(models: Models, ids: Sequence[Sequence[int]]) -> float:
    """The share of completions that do."""
    return fmean(ends(models, ids))


def ask_judge(
    run: Run,
    models: Models,
    stage: str,
    iteration: int | None,
    prompts: list[str],
    completions: list[list[str]],
    references: list[str | None],
) -> JudgeResult:
    """The configured judge's verdicts, which are kept on the disk until the stage is done; of a run that has one."""
    assert models.judge is not None
    verdicts = Verdicts(run.store.verdicts(stage, iteration))
    return judge_pairs(models.judge, prompts, completions, references, verdicts, batch_size=run.config.eval_batch_size)
