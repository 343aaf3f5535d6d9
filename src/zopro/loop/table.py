"""The stages of a run in their order, as a table: what each is called, leaves behind and does, and who takes part.

`zopro run` walks all of it; a comparison (`zopro.compare`) prepares what its trainings share by part of it.

    for stage, iteration in walk(config, config.iterations):
        if not stage.done(run.store, iteration):
            stage.work(run, models, data, iteration)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zopro.config import RunConfig
from zopro.loop.data import Data
from zopro.loop.evaluation import evaluate
from zopro.loop.models import Models
from zopro.loop.policy_stage import ranks_share, train_policy
from zopro.loop.run import Run
from zopro.loop.stages import refine_reward, sample_pairs, train_reward, train_sft
from zopro.store.rundir import RunDirectory

EVALUATION = "evaluation"


@dataclass(frozen=True)
class Stage:
    """One line of the table. What is called gets the iteration as its last argument in the stages of the loop alone.

    name: as in metrics.jsonl. function: does the work. output: its path, which is there when the work is done, whole.
    in_loop: once in each iteration. shared: whether all ranks of a run take part; without it, or where it says no, the
    first one works alone. of_reward: only in runs that train a reward model.
    """

    name: str
    function: Callable[..., object]
    output: Callable[..., Path]
    in_loop: bool = True
    shared: Callable[..., bool] | None = None
    of_reward: bool = False

    def title(self, iteration: int | None) -> str:
        return self.name if iteration is None else f"{self.name} {iteration}"

    def done(self, store: RunDirectory, iteration: int | None) -> bool:
        return self.output(store, *_given(iteration)).exists()

    def work(self, run: Run, models: Models, data: Data, iteration: int | None) -> None:
        self.function(run, models, data, *_given(iteration))

    def for_all(self, run: Run, iteration: int | None) -> bool:
        """Whether all ranks of many take part."""
        return run.processes.size > 1 and self.shared is not None and self.shared(run, *_given(iteration))


STAGES = (
    Stage("sft", train_sft, lambda store: store.sft(), in_loop=False),
    Stage("reward", train_reward, lambda store: store.reward(0), in_loop=False, of_reward=True),
    Stage(EVALUATION, evaluate, lambda store: store.evaluation(None, ".json"), in_loop=False),
    Stage("policy", train_policy, lambda store, i: store.policy(i), shared=ranks_share),
    Stage("pairs", sample_pairs, lambda store, i: store.preferences(i), of_reward=True),
    Stage("refine", refine_reward, lambda store, i: store.reward(i + 1), of_reward=True),
    Stage(EVALUATION, evaluate, lambda store, i: store.evaluation(i, ".json")),
)


def walk(config: RunConfig, iterations: int) -> Iterator[tuple[Stage, int | None]]:
    """The stages of a run's first iterations, each with its iteration; None before the loop."""
    stages = [stage for stage in STAGES if config.trains_reward or not stage.of_reward]
    yield from ((stage, None) for stage in stages if not stage.in_loop)
    for iteration in range(iterations):
        yield from ((stage, iteration) for stage in stages if stage.in_loop)


def _given(iteration: int | None) -> tuple[int, ...]:
    return () if iteration is None else (iteration,)
