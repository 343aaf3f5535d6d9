"""The engine over vLLM servers: `engine: vllm:http://HOST:PORT`, or several of them with commas.

engine = VLLMEngine(Fleet([Server("http://127.0.0.1:8000")]), Weights.of(tensors.items(), Gaussian()), alpha=16.0)
rollouts = engine.sample(prompts, 1, options, strategy.ask(step))       # one for each displaced policy
engine.apply(strategy.tell([mean(reward(r)) for r in rollouts]))

theta is a few MB of fp32 tensors here. theta + t eps z is published as one more adapter, by whichever server is free, and
forgotten when it has answered. The base's weights are the servers' alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zopro.engine import Abilities, Batch, Rollouts, Sampling
from zopro.engine.batch import again, check_prompts, uniform_numbers
from zopro.engine.local.sampling import Sampler
from zopro.engine.servers.adapters import named
from zopro.engine.servers.rows import rollouts_of, unpadded
from zopro.engine.servers.vllm.client import Server
from zopro.engine.servers.vllm.publishing import Published
from zopro.engine.servers.vllm.sharing import Fleet
from zopro.errors import InputError
from zopro.zo import Weights
from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord

SEEDS = 2**31  # of rows

T = TypeVar("T")


class VLLMEngine:
    """An `Engine` over servers of one model, and a LoRA adapter.

    Args:
        fleet: the servers, which have been greeted.
        weights: the adapter's tensors by plain PEFT names (`zopro.weights.adapters.tensor_name`), fp32 on the CPU. None
            at all: the model without an adapter.
        alpha: LoRA's scaling numerator (scale = alpha / r).
        folder: where adapters are published; it and the servers see it by the same path. "": shared memory.
    """

    def __init__(self, fleet: Fleet, weights: Weights, alpha: float, folder: str = "") -> None:
        self.fleet, self.alpha, self.folder = fleet, alpha, folder
        self._tensors: dict[str, Tensor] = {}
        self.hold(weights)

    def hold(self, weights: Weights) -> None:
        """theta and its directions: all of the policy's tensors at first, and later those or a part of them."""
        self.weights = weights
        self._tensors |= dict(named(weights))

    @property
    def abilities(self) -> Abilities:
        return Abilities(at_once=max(1, self.fleet.slots), exact=False)

    def parts(self) -> list[VLLMEngine]:
        """The same policy at each server alone."""
        one = [Fleet([server], self.fleet.timeout) for server in self.fleet.servers]
        return [VLLMEngine(fleet, self.weights, self.alpha, self.folder) for fleet in one]

    def sample(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, at: Sequence[Displacement | None] = (None,)
    ) -> list[Rollouts]:
        """As `Engine.sample`; `logprobs` are NaN where `temperature` is not 1, at which servers do not say them.

        Raises InputError: an option out of range, a prompt without room for its answer, or no server left.
        """
        Sampler(options.do_sample, options.temperature, options.top_k, options.top_p, options.min_p or 0.0)
        context = min(server.context for server in self.fleet.servers)
        check_prompts(prompts, k, options.max_new_tokens, context)
        generator = options.generator if len(at) == 1 else again(options.generator)
        drawn = uniform_numbers(generator, len(prompts) * k, 1, torch.device("cpu"))[:, 0]
        seeds = (drawn * SEEDS).long().tolist()
        rows = [prompt for prompt in prompts for _ in range(k)]

        def answer(server: Server, model: str) -> Rollouts:
            found = server.sample(model, rows, seeds, options)
            scores = torch.zeros(len(rows), options.max_new_tokens)
            for row, (_, tokens) in zip(scores, found, strict=True):
                row[: len(tokens)] = torch.tensor(tokens) if options.temperature == 1 else math.nan
            return rollouts_of(prompts, k, [ids for ids, _ in found], scores, options.pad_token_id)

        return self._at(at, answer)

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        """As `Engine.logprobs`. Raises InputError: a temperature that is not 1, or no server left."""
        if temperature != 1:
            raise InputError(f"temperature: must be 1, at which vLLM gives log-probs of given tokens, got {temperature}.")
        answers = unpadded(batch.completion_ids, batch.completion_mask)
        prompts = unpadded(batch.prompt_ids, batch.attention_mask[:, : -batch.completion_length])
        rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]

        def score(server: Server, model: str) -> Tensor:
            found = torch.zeros(len(rows), batch.completion_length)
            for row, tokens in zip(found, server.score(model, rows, [len(answer) for answer in answers]), strict=True):
                row[: len(tokens)] = torch.tensor(tokens)
            return found

        return self._at(at, score)

    def apply(self, record: StepRecord) -> None:
        self.weights.apply(record)

    def _at(self, at: Sequence[Displacement | None], ask: Callable[[Server, str], T]) -> list[T]:
        """What `ask` finds at each displacement, by a server and the name of the policy there."""
        with Published(self.folder) as published:

            def publish(index: int) -> Path | None:
                where, tensors = at[index], self._tensors
                if where is not None and where.t != 0:
                    tensors = {**tensors, **self.weights.at(where)}
                return published.write(tensors, self.alpha) if tensors else None

            def work(server: Server, adapter: Path | None) -> T:
                if adapter is None:
                    return ask(server, server.base)
                server.load(adapter.name, adapter)
                found = ask(server, adapter.name)
                server.unload(adapter.name)  # one that has failed is told when it is back
                return found

            def forget(adapter: Path | None) -> None:
                if adapter is not None:
                    published.remove(adapter)

            return self.fleet.share(len(at), publish, work, forget)
