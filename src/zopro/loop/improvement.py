"""Whether an iteration has improved the policy: held-out rewards beside those of the policy before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.config.template import FAR
from zopro.loop.correctness import paired
from zopro.store import shown

HARDLY = 0.1
"""Nats an answer: nearer to its start than this, a policy says what the start says."""


def follower(config: RunConfig, iteration: int) -> str:
    """The method of later iterations, if it is another one that follows this one's update however short that is."""
    scaled = config.preset_of(config.method) == "paper"  # whose steps are in proportion to the update
    follows = METHODS[config.method].follows_update and config.method_of(iteration) != config.method and not scaled
    return config.method if follows else ""


def not_improved(
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    where: str,
    rate: str,
    kl: float,
    followed_by: str = "",
) -> str | None:
    """The line about an iteration whose gain, paired by prompt, may be none; None where it is above 0.

    Args:
        before, after: rows of the two evaluations, of the same prompts.
        where: what the line begins with.
        rate: the key of the learning rate.
        kl: nats an answer from the policy's start.
        followed_by: `follower` of the iteration.

    >>> rows = [[{"reward": value} for value in values] for values in ([0.0, 1.0, 2.0], [1.0, 2.1, 2.9])]
    >>> not_improved(*rows, "iteration 0", "learning_rate", 2.0)
    >>> not_improved(*reversed(rows), "iteration 0", "learning_rate", 2.0)
    'iteration 0: the policy became worse: reward -1.000 [-1.113, -0.887] against the one before. Lower learning_rate.'
    >>> not_improved(rows[0], rows[0], "iteration 0", "learning_rate", 0.004)
    'iteration 0: the policy has hardly moved: KL 0.00 nats an answer, reward ... Raise learning_rate, tenfold and more.'
    """
    name = "sampled_reward" if any("sampled_reward" in row for row in after) else "reward"
    interval = paired(before, after, name)
    if interval is None or interval[1] > 0:
        return None
    gain, low, high = interval
    said = f"reward {shown.interval({'gain': gain, 'gain_low': low, 'gain_high': high}, 'gain')} against the one before"
    if high < 0:
        return f"{where}: the policy became worse: {said}. Lower {rate}."
    if abs(kl) < HARDLY:
        moved = f"KL {shown.kl(kl)} nats an answer"
        hardly = f"{where}: the policy has hardly moved: {moved}, {said}."
        if followed_by:
            follows = f"{followed_by} follows its update however short that is"
            return f"{hardly} {follows}. Raise {rate} if {followed_by} gains nothing."
        return f"{hardly} Raise {rate}, tenfold and more."
    steps = "more steps (policy_steps) or answers (prompts_per_step, num_generations or population)"
    take = f"Take {steps}, a higher {rate}, or measure on more prompts (eval_prompts)."
    if kl > FAR:
        far = f"not a higher {rate}: it is {shown.kl(kl)} nats an answer from its start already"
        take = f"Take {steps}, or measure on more prompts (eval_prompts); {far}."
    return f"{where}: no improvement that can be told from chance: {said}. {take}"
