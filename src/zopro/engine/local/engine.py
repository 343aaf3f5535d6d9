"""The engine over a transformers model in this process, on any device.

It displaces the model's own tensors: in place, virtually, or both sides of a direction in one pass (`zopro.zo`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from zopro.engine import Abilities, Batch, Rollouts, Sampling
from zopro.engine.batch import again
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.displaced import members_logprobs
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.members import Apart, Members
from zopro.engine.local.rollouts import MAX_BATCH_TOKENS, generate
from zopro.system.clock import Clock, timed
from zopro.system.heap import expect_graph
from zopro.zo.displacement import Displacement
from zopro.zo.evaluation import Evaluator
from zopro.zo.records import StepRecord
from zopro.zo.weights import Weights

T = TypeVar("T")
logger = logging.getLogger(__name__)


class LocalEngine:
    """An `Engine` over a causal model, or a PEFT model over one.

    Args:
        model: in the mode (train, eval) that log-probs are to be taken in; sampling is in eval mode.
        weights: what of the model is displaced and moved; without it the engine is at theta only.
        autocast: makes a context around whatever runs the model; in 16 bits it answers as it is.
        member_tokens: bound on members x rows x (prompt + new tokens) that answer in one pass of the base weights; each
            member holds its displaced matrices while it does. 0: one after another.

    Attributes:
        clock: is told how long passes that give log-probs take.
        logprob_tokens: as `member_tokens`, of displacements whose log-probs are taken in one pass.
    """

    clock: Clock | None = None
    logprob_tokens = 0

    def __init__(
        self,
        model: Any,
        weights: Weights | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        member_tokens: int = MAX_BATCH_TOKENS,
    ) -> None:
        self.model, self.weights, self.autocast = model, weights, autocast
        self._evaluator: Evaluator | None = None
        self.member_tokens = member_tokens

    @property
    def abilities(self) -> Abilities:
        if self._evaluator is not None:  # of log-probs
            pair = 1 if self._evaluator.together is None else 2
            return Abilities(at_once=max(pair, self.logprob_tokens))
        return Abilities(at_once=max(1, self.member_tokens) if self.weights is not None else 1)  # each has some tokens

    @contextmanager
    def during(self, evaluator: Evaluator | None) -> Iterator[None]:
        """A context whose calls can be compared: `evaluator` displaces, and each begins with its random state."""
        self._evaluator = evaluator
        try:
            yield
        finally:
            self._evaluator = None

    def sample(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, at: Sequence[Displacement | None] = (None,)
    ) -> list[Rollouts]:
        """As `Engine.sample`. Raises what `generate` raises; ValueError for a displacement without weights."""
        expect_graph(False)
        if len(at) > 1 and self.member_tokens and self.weights is not None:
            evaluator = self._evaluator or Evaluator(self.weights)
            try:
                return self._sample_together(prompts, k, options, at, evaluator)
            except Apart as reason:
                logger.info("members of a population answer one after another: %s", reason)
                self.member_tokens = 0
                evaluator.begin()

        def answer() -> Rollouts:
            with self._answering():
                return generate(self.model, prompts, num_generations=k, **self._drawing(options, len(at)))

        return self._at(at, answer)

    def _answering(self) -> AbstractContextManager[Any]:
        """Around sampling: of a model in 16 bits autocast would only round its float32 adapters, and keep a GPU from
        decoding by captured graphs."""
        return self.autocast() if self.model.dtype == torch.float32 else nullcontext()

    def _sample_together(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        options: Sampling,
        at: Sequence[Displacement | None],
        evaluator: Evaluator,
    ) -> list[Rollouts]:
        """As many displacements at a time as `member_tokens` allows, in one pass of the base weights."""
        longest = max(map(len, prompts), default=0) + options.max_new_tokens
        found: list[Rollouts] = []
        for members in self._groups(at, self.member_tokens, len(prompts) * k * longest):
            given = self._drawing(options, len(at))
            evaluator.begin()  # the same random numbers also from the global state
            with self._answering():
                drawn = generate(self.model, prompts, num_generations=k, members=members, **given)
            found += drawn.split(members.count)
        return found

    def _groups(self, at: Sequence[Displacement | None], tokens: int, each: int) -> Iterator[Members]:
        """The displacements, as many at a time as `tokens` allow where each has so many."""
        size = max(1, tokens // max(1, each))
        size = math.ceil(len(at) / math.ceil(len(at) / size))  # no small rest
        size += size % 2 if size > 1 else 0  # both sides of a direction share what they read
        for start in range(0, len(at), size):
            yield Members(self._held(), at[start : start + size])

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        """As `Engine.logprobs`, differentiable if autograd is on; rows of the same prompt share its pass.

        Raises what `completion_logprobs` raises; ValueError for a displacement without weights.
        """
        expect_graph(False)
        watched = self._evaluator is not None and self._evaluator.watch is not None  # which sees one pass at a time
        if len(at) > 1 and self.logprob_tokens and self.weights is not None and not (watched or torch.is_grad_enabled()):
            try:
                return self._logprobs_together(batch, at, temperature)
            except Apart as reason:
                logger.warning("log-probs at displacements are taken one after another: %s", reason)
                self.logprob_tokens = 0
        together = None if self._evaluator is None else self._evaluator.together
        if together is not None:
            abilities(causal_parts(self.model))  # whose first look at a model is at rows of its own

        def score(rows: Batch, copies: int) -> Tensor:
            if together is None or not together.active:
                return self.score(rows, copies, temperature)
            return together.rows(lambda: self.score(rows.twice(), copies, temperature))

        def tokens() -> Tensor:
            with self.autocast():
                return by_prompt(batch, score)

        return self._at(at, tokens)

    @timed("log-probs")
    def _logprobs_together(self, batch: Batch, at: Sequence[Displacement | None], temperature: float) -> list[Tensor]:
        """As many displacements at a time as `logprob_tokens` allows, in one pass of the base weights."""
        evaluator = self._evaluator or Evaluator(self._held())
        found: list[Tensor] = []
        for members in self._groups(at, self.logprob_tokens, batch.input_ids.numel()):
            evaluator.begin()
            with self.autocast():
                tokens = by_prompt(batch, lambda rows, k, m=members: self._of_all(rows, k, temperature, m))  # type: ignore[misc]
            if evaluator.drew():
                evaluator.begin()
                raise Apart("dropout draws another mask for each of them")
            found += tokens.unbind(1)
        return found

    def _of_all(self, rows: Batch, copies: int, temperature: float, members: Members) -> Tensor:
        """(B, members, C)."""
        return torch.stack(members_logprobs(self.model, rows, copies, temperature, members), dim=1)

    @timed("log-probs")
    def score(self, batch: Batch, copies: int, temperature: float) -> Tensor:
        """One pass: log-probs (B, C) of rows of which each `copies` share a prompt."""
        return completion_logprobs(self.model, *batch, temperature=temperature, num_generations=copies)

    def hold(self, weights: Weights) -> None:
        self.weights = weights

    def apply(self, record: StepRecord) -> None:
        self._held().apply(record)

    def _at(self, at: Sequence[Displacement | None], function: Callable[[], T]) -> list[T]:
        if self._evaluator is None and all(displacement is None for displacement in at):
            return [function() for _ in at]
        evaluator = self._evaluator or Evaluator(self._held())
        return evaluator.results(function, at, lambda result: result)

    def _held(self) -> Weights:
        if self.weights is None:
            raise ValueError("weights: must be given to an engine that is to be displaced or moved, got None")
        return self.weights

    def _drawing(self, options: Sampling, times: int) -> dict[str, Any]:
        """Arguments of `generate`; of several displacements each has generators at the same place."""
        generator = options.generator if times == 1 else again(options.generator)
        return {**vars(options), "generator": generator}


def by_prompt(batch: Batch, score: Callable[[Batch, int], Tensor]) -> Tensor:
    """`score(rows, copies)` of rows that are in such an order that each `copies` share a prompt, back in the batch's."""
    lengths = batch.attention_mask[:, : -batch.completion_length].sum(1)  # an id may be padding here and a token there
    prompts = list(zip(batch.prompt_ids.tolist(), lengths.tolist(), strict=True))
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    counts = {len(list(group)) for _, group in groupby(prompts[row] for row in order)}
    rows = torch.tensor(order, device=batch.input_ids.device)
    return score(batch.rows(rows), counts.pop() if len(counts) == 1 else 1)[torch.argsort(rows)]
