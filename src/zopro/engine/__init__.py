"""What runs the model: the protocol that every engine follows, and the engines, each in a folder. Knows no training.

A zeroth-order step is: displacements out, numbers in, a record applied. The strategy (`zopro.zo.strategy`) names the
policies theta + t eps z, the engine says what they answer or how likely given answers are under them, the strategy makes
a record of that, and everyone who holds theta applies the record. With a reward of answers in place of their likelihood
that is an evolution strategy; nothing else changes:

    for step in range(steps):
        at = strategy.ask(step)                                       # a few numbers for each displaced policy
        values = [float(loss(tokens)) for tokens in engine.logprobs(batch, at)]             # SPSA: of fixed answers
        # or   = [mean(reward(r)) for r in engine.sample(prompts, 1, options, at)]          # a population: of its own
        record = strategy.tell(values)
        journal.write(record)
        engine.apply(record)

An engine gets all displacements of a step in one call, so that it decides what runs together: a local one displaces
tensors in place, one after another or both sides in one pass; a GPU engine has a row's own adapter in a batch; a server
publishes `Weights.at(displacement)` as one more adapter and asks for it by name. Ranks deal displacements out among
themselves before (`zopro.zo.ranks`), so each one's engine gets its share, and exchange the values only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from zopro.engine.batch import Batch, Rollouts, Sampling
from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord
from zopro.zo.weights import Weights

__all__ = ["Abilities", "Batch", "Engine", "OverTensors", "Rollouts", "Sampling", "Scores"]


@dataclass(frozen=True)
class Abilities:
    """What an engine can do, for those who choose a method or say why one does not go."""

    logprobs: bool = True  # of given answers; without them only rewards of its own answers are left
    scores: bool = False  # it has a reward model beside the policy: it is a `Scores` too
    at_once: int = 1  # displacements that go through the network in one batch
    exact: bool = True  # the same displacements give the same bits, so that a killed run goes on as it would have


class Engine(Protocol):
    """A policy that can be asked at displacements. None, and t = 0, are theta itself.

    Results are one for each displacement, in their order. Randomness is common: at each displacement the same random
    numbers draw the tokens and the dropout, so that values differ by the displacement alone.
    """

    @property
    def abilities(self) -> Abilities: ...

    def sample(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, at: Sequence[Displacement | None] = (None,)
    ) -> list[Rollouts]:
        """`k` completions of each prompt (token ids, none empty)."""

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        """(B, C) fp32 log-probs in nats of the completions' tokens under softmax(logits / temperature), 0 on padding."""

    def apply(self, record: StepRecord) -> None:
        """Take a step: theta moves, everywhere the engine holds it, by the numbers of the record alone."""


@runtime_checkable
class OverTensors(Protocol):
    """An engine without tensors of its own: it reads and moves those of whoever holds the policy."""

    def hold(self, weights: Weights) -> None:
        """Read and move these from now on: the policy's tensors, or a part of them, and their directions."""


class Scores(Protocol):
    """An engine with a reward model beside the policy."""

    def scores(self, batch: Batch) -> Tensor:
        """(B,) fp32 rewards of the completions, in the reward model's unit."""
