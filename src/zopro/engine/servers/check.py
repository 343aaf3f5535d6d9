"""Whether an engine does what it says, before a run is built on it: a few short passes at theta and beside it.

Servers are known to answer with a stale adapter, with none, or from a cache of another one's prompt, and report success.

for line in check_engine(engine, prompts, options): print(line)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from torch import Tensor

from zopro.engine import Batch, Engine, Sampling
from zopro.errors import InputError
from zopro.zo.displacement import Displacement
from zopro.zo.schedules import auto_eps

ANSWER = 8  # tokens of the answers that are looked at
VISIBLE = 0.05  # eps of a displacement that no arithmetic hides
AGREE = 0.5  # nats a token, root mean square, that two ways to one log-prob may differ by: with 4 bits it is 0.1
SHOWS = 3.0  # times the noise that a difference must be, to be one


def check_engine(engine: Engine, prompts: Sequence[Sequence[int]], options: Sampling, differences: bool) -> list[str]:
    """What was found out about the engine, a line each.

    Args:
        options: stops and padding; answers are short and greedy here.
        differences: also look for a distance at which differences of log-probs mean something, which takes tens of
            passes; only steps that are made of log-probs need it.

    Raises InputError: it does not do what an engine must, and what may help.
    """
    short = dataclasses.replace(options, max_new_tokens=min(ANSWER, options.max_new_tokens), do_sample=False)
    rollouts = engine.sample(prompts, 1, short)[0]
    if not engine.abilities.logprobs:
        return []
    batch = Batch.of(rollouts)
    there = Displacement(seed=0, query=0, step=0, t=1.0, eps=(VISIBLE,))
    first, moved, again = engine.logprobs(batch, [None, there, None], options.temperature)
    once_more = engine.logprobs(batch, [None], options.temperature)[0]
    exact = engine.abilities.exact
    noise = _distance(first, once_more, batch)
    if not bool(first.isfinite().all()):
        raise InputError("engine: its log-probs are not finite. Take another file, or another quantisation.")
    if noise > (0.0 if exact else AGREE):
        raise InputError(
            f"engine: the same policy's log-probs differ by {noise:.2g} nats a token between two calls. "
            "Nothing can be learned from differences that small; use one server, or take method: es."
        )
    if _distance(first, moved, batch) <= noise:
        raise InputError(
            "engine: a displaced adapter changes no log-prob, so adapters are ignored. Use the versions that the page on "
            "serving names, and modules that the engine takes adapters on (lora_target_modules)."
        )
    if _distance(first, again, batch) > noise:
        raise InputError(
            "engine: theta does not read as before after another adapter was asked for: a stale adapter or a prompt "
            "cached under another one's. Turn its prefix cache off."
        )
    apart = _distance(first, rollouts.logprobs, batch)
    if apart > AGREE:
        raise InputError(
            f"engine: log-probs of sampled tokens are {apart:.2g} nats a token from those of the same tokens given to "
            "it: it samples from another policy than it scores. Take other versions, or other sampling options."
        )
    lines = [f"engine: theta repeats, adapters are heeded; sampling and scoring differ by {apart:.1g} nats a token"]
    return [*lines, _differences(engine, batch, options.temperature)] if differences else lines


def _differences(engine: Engine, batch: Batch, temperature: float) -> str:
    """Which eps shows the slope of the mean log-prob along a random direction."""

    def loss_at(t: float) -> float:
        at = Displacement(seed=0, query=0, step=0, t=t, eps=(1.0,))
        tokens = engine.logprobs(batch, [at], temperature)[0]
        return -float(tokens.double().sum() / batch.completion_mask.sum())

    eps, noise = auto_eps(loss_at)
    if not math.isfinite(eps * noise):
        raise InputError(
            "engine: the log-probs along a direction are constant or not finite, so they show no slope. Take another "
            "file, or method: es, which needs rewards alone."
        )
    signal = abs(loss_at(eps) - loss_at(-eps)) / (math.sqrt(2) * noise)
    found = f"engine: a mean log-prob has a noise of {noise:.1g} nats"
    if signal < SHOWS:
        return f"{found}, which hides slopes: method: es needs none, and a file of higher precision has less noise"
    return f"{found}; at eps {eps:.1g} a slope stands {signal:.0f} times above it"


def _distance(one: Tensor, other: Tensor, batch: Batch) -> float:
    """Root mean square over real tokens."""
    real = batch.completion_mask.bool()
    return float((one - other)[real].double().square().mean().sqrt())
