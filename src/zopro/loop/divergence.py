"""How far a policy is from the SFT policy, KL(policy || SFT), estimated from its own sampled answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from zopro.engine import Batch, Rollouts
from zopro.engine.opening import logprobs as logprobs_of
from zopro.loop.correctness import named
from zopro.loop.models import Models
from zopro.loop.run import Run
from zopro.store import shown
from zopro.system.progress import counted
from zopro.system.statistics import crossed_interval


def policy_logprobs(model: Any, rollout: Rollouts, temperature: float) -> Tensor:
    """Log-probs [B, C] that belong beside another policy's: of the same kind of pass.

    In float32 sampling gives the same numbers to 1e-5. In bfloat16 it is off by tenths of a nat an answer, to one side.
    """
    return rollout.logprobs if model.dtype == torch.float32 else _pass(model, rollout, temperature)


def log_ratios(
    run: Run, models: Models, policy: Path, rollouts: Sequence[Rollouts], logprobs: Sequence[Tensor]
) -> list[float]:
    """log pi(answer) - log pi_SFT(answer) of each sampled answer, in nats.

    Args:
        policy: the folder of the policy that drew the answers. Of the SFT policy itself the ratios are known to be 0.
        logprobs: the policy's (`policy_logprobs`), [B, C] for each batch.
    """
    if policy == run.store.sft():
        return [0.0 for rollout in rollouts for _ in rollout.completion_ids]
    found: list[float] = []
    start = shown.start(run.config.sft_steps).the
    with models.policies.open(run.store.sft()) as sft:
        for rollout, ours in counted([*zip(rollouts, logprobs, strict=True)], f"log-probs of {start}"):
            theirs = _pass(sft, rollout, run.config.temperature)
            found += ((ours - theirs) * rollout.completion_mask).sum(1).tolist()
    return found


def kl_per_answer(answers: Sequence[float]) -> float:
    """KL in nats per answer: the mean of answers' log-ratios, or 0 where that is below, as no divergence is.

    >>> kl_per_answer([-0.5, 0.25]), kl_per_answer([1.0, float("nan")])
    (0.0, nan)
    """
    mean = fmean(answers)
    return 0.0 if mean < 0 else mean  # not max(), which would hide a NaN


def kl_interval(answers: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """`kl_per_answer` of log-ratios [seed][prompt] with its 95 % interval, of which no bound is below 0 either.

    >>> kl_interval([[1.0, 1.0]]), kl_interval([[-1.0, 0.5]])[:2]
    ((1.0, 1.0, 1.0), (0.0, 0.0))
    """
    mean, low, high = (0.0 if value < 0 else value for value in crossed_interval(answers))
    return mean, low, high


def elsewhere(answers: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How far a policy has moved on prompts of another task, from log-ratios [seed][prompt] in nats."""
    return {**named(shown.ELSEWHERE, kl_interval(answers)), "other_n": len(answers[0])}


def _pass(model: Any, rollout: Rollouts, temperature: float) -> Tensor:
    return logprobs_of(model, Batch.of(rollout), temperature)
