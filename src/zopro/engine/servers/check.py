"""Whether an engine does what it says, before a run is built on it: a few short passes at theta and beside it.

Servers are known to answer with a stale adapter, with none, with a part of one, or from a cache of another one's prompt,
and report success.

for line in check_engine(engine, prompts, options): print(line)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zopro.engine import Batch, Engine, OverTensors, Sampling
from zopro.errors import InputError
from zopro.zo.displacement import Displacement
from zopro.zo.eps import auto_eps

ANSWER = 8  # tokens of the answers that are looked at
VISIBLE = 0.05  # eps of a displacement that no arithmetic hides
WIDE = 0.2  # eps of one on the modules of one kind alone
AGREE = 0.5  # nats a token, root mean square, that two ways to one log-prob may differ by: with 4 bits it is 0.1
SHOWS = 3.0  # times the noise that a difference must be, to be one
SAME = 0.25  # of a displacement's effect: what differs by less is the same policy, where arithmetic is not exact
OTHER_WEIGHTS = 0.1  # nats a token, as above: an exact engine's own weights read alike on another machine
PART = 0.01  # of the effect of all modules: those of one kind that do less do nothing

THERE = Displacement(seed=0, query=0, step=0, t=1.0, eps=(VISIBLE,))


@torch.no_grad()
def check_engine(engine: Engine, prompts: Sequence[Sequence[int]], options: Sampling, differences: bool) -> list[str]:
    """What was found out about the engine, a line each; of one that is several servers, about each of them.

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
    parts: list[Any] = getattr(engine, "parts", lambda: [engine])()
    found = [_Look(part, batch, options.temperature) for part in parts]
    apart = _distance(found[0].first, rollouts.logprobs, batch)
    if apart > AGREE:
        raise InputError(
            f"engine: log-probs of sampled tokens are {apart:.2g} nats a token from those of the same tokens given to "
            "it: it samples from another policy than it scores. Take other versions, or other sampling options."
        )
    for part, look in zip(parts[1:], found[1:], strict=True):
        if (between := _distance(found[0].first, look.first, batch)) > AGREE:
            raise InputError(
                f"engine: servers must hold one model, got {between:.2g} nats a token between the first and number "
                f"{1 + parts.index(part)}. Start them with the same model and --dtype."
            )
    lines = [f"engine: theta repeats, adapters are heeded; sampling and scoring differ by {apart:.1g} nats a token"]
    return [*lines, _differences(engine, batch, options.temperature)] if differences else lines


class _Look:
    """A look at one engine, or one server of several. first: its log-probs of the batch at theta.

    Raises InputError: what is wrong.
    """

    def __init__(self, engine: Engine, batch: Batch, temperature: float) -> None:
        self.engine, self.batch, self.temperature = engine, batch, temperature
        self.first, moved, again = self._at(None, THERE, None)
        once_more, alone = self._at(None)[0], self._at(THERE)[0]
        exact = engine.abilities.exact
        self.noise, effect = self._off(once_more), self._off(moved)
        if not all(bool(one.isfinite().all()) for one in (self.first, moved, again, once_more, alone)):
            raise InputError("engine: its log-probs are not finite. Take another file, or another quantisation.")
        if self.noise > (0.0 if exact else AGREE):
            raise InputError(
                f"engine: the same policy's log-probs differ by {self.noise:.2g} nats a token between two calls. "
                "Nothing can be learned from differences that small; use one server, or take method: es."
            )
        if effect <= self.noise:
            raise InputError(
                "engine: a displaced adapter changes no log-prob, so adapters are ignored. Use the versions that the "
                "page on serving names, and modules that the engine takes adapters on (lora_target_modules)."
            )
        same = 0.0 if exact else max(self.noise, SAME * effect)
        if self._off(again) > same:
            raise InputError(
                "engine: theta does not read as before after another adapter was asked for: a stale adapter or a prompt "
                "cached under another one's. Turn its prefix cache off."
            )
        if (mixed := _distance(moved, alone, batch)) > same:
            raise InputError(
                f"engine: two adapters in one batch read {mixed:.2g} nats a token otherwise than one after another: "
                "their rows are mixed up. Let it have one adapter at a time (--max-loras 1)."
            )
        if isinstance(engine, OverTensors) and (deaf := self._deaf()):
            raise InputError(
                f"engine: adapters must be heeded on all modules that have one, got none on {', '.join(deaf)}. Leave "
                "these out of lora_target_modules, or start the engine with them."
            )

    def _deaf(self) -> list[str]:
        """Kinds of modules whose displacement changes nothing."""
        weights: Any = self.engine.weights  # type: ignore[attr-defined]
        at, kept = dataclasses.replace(THERE, eps=(WIDE,)), weights.left_out
        names = [name for name, _, _ in weights.entries]
        try:
            threshold = max(1.5 * self.noise, PART * self._off(self._at(at)[0]))
            found = []
            for kind in sorted({_kind(name) for name in names}):
                weights.left_out = [*kept, *(name for name in names if _kind(name) != kind)]
                if self._off(self._at(at)[0]) <= threshold:
                    found.append(kind)
            return found
        finally:
            weights.left_out = kept

    def _at(self, *at: Displacement | None) -> list[Tensor]:
        return self.engine.logprobs(self.batch, at, self.temperature)

    def _off(self, other: Tensor) -> float:
        return _distance(self.first, other, self.batch)


def _kind(name: str) -> str:
    """Of a module, by the name of its adapter's tensor.

    >>> _kind("model.layers.0.mlp.up_proj.lora_A.weight")
    'up_proj'
    """
    return name.partition(".lora_")[0].rpartition(".")[2]


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


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Root mean square of the differences of log-probs, in nats a token; NaN of none.

    >>> apart([-1.0, -2.0, -3.0, -4.0], [-1.0, -2.0, -3.0, -6.0])
    1.0
    """
    return math.dist(one, other) / math.sqrt(len(one)) if one else math.nan


def _distance(one: Tensor, other: Tensor, batch: Batch) -> float:
    """Root mean square over real tokens."""
    real = batch.completion_mask.bool()
    return float((one - other)[real].double().square().mean().sqrt())
