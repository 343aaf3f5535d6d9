"""What a run will take: minutes and memory, from one timed step of its own model, prompts and lengths.

A step's parts are timed with a fresh adapter: answers sampled, their log-probs, and where the run back-propagates their
gradient. Each stage is so many of these (`seconds_of`). Nothing is learned, kept or written, and random numbers come from
generators of its own, so a run with an estimate is the same to the bit as one without.

    zopro run CONFIG.yaml --dry-run
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zopro.choices import BACK_PROPAGATION, METHODS
from zopro.config import RunConfig
from zopro.engine import Batch
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.opening import logprobs
from zopro.loop.answers import sample
from zopro.loop.data import Data
from zopro.loop.models import Models
from zopro.loop.opening import open_all
from zopro.loop.policy_stage import policy_steps
from zopro.loop.run import Run
from zopro.loop.table import EVALUATION, Stage, walk
from zopro.store.rundir import check_folder, default_folder
from zopro.system import progress
from zopro.system.memory import kept_for_backward, peak_rss_mb, used_mb
from zopro.system.screens import duration
from zopro.system.terminal import Page, Table

CHECKPOINTED = "rloo-checkpointed"  # which keeps one block's activations at a time
GRAPH = 1.6  # times what is kept for a backward pass, with gradients beside it: measured for 16 rows of 400 tokens, 135M
TIMED_ANSWERS = 8  # at most, of one step, on a CPU: what takes longer is not one step's to know


@dataclass(frozen=True)
class Timed:
    """One step in numbers. call: seconds for sampling a batch, whatever its size. sample: seconds for each answer in it.
    forward: seconds for the log-probs of an answer. backward: with their gradient (NaN where none is taken). peak_mb:
    memory after it, of the GPU where there is one, or what the largest backward pass of the run keeps. answers: timed."""

    call: float
    sample: float
    forward: float
    backward: float
    peak_mb: float
    answers: int


def time_step(run: Run, models: Models, data: Data) -> Timed:
    """Sample a step's answers by a fresh policy and measure them."""
    config, on_gpu = run.config, models.base.device.type == "cuda"
    count = 1 if METHODS[config.method].population else config.num_generations
    prompts = config.answers_a_step(config.method) // count
    prompts = prompts if on_gpu else max(1, min(prompts, TIMED_ANSWERS // count))
    items = [data.train[i % len(data.train)] for i in range(prompts)]
    with progress.task("timing one step"), models.policies.open(None, trainable=True) as model:
        few, _ = _timed(models, lambda: sample(run, models, model, items[:1], 0, count))
        seconds, rollout = _timed(models, lambda: sample(run, models, model, items, 0, count))
        batch = _first(Batch.of(rollout), config.eval_batch_size)  # as many as a run's pass has
        backward, needed = float("nan"), 0.0
        forward, _ = _timed(models, lambda: logprobs(model, batch, config.temperature))
        if _goes_back(run):
            trained, before = _first(batch, _back_propagated(run)), used_mb(models.base.device)
            with kept_for_backward(model.parameters()) as kept_mb:
                backward, _ = _timed(models, lambda: completion_logprobs(model, *trained).sum().backward(), once=True)
            backward /= len(trained.input_ids)
            longest = max(len(item.ids) for item in data.train) + config.max_completion_length
            needed = before + GRAPH * kept_mb() / trained.input_ids.numel() * longest * _kept_at_once(run, data)
        needed = (needed or used_mb(models.base.device)) + _of_whole_models(run, model) if not config.lora_r else needed
    peak = max(needed, torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_rss_mb())
    answers = len(items) * count
    call, each = fitted(count, few, answers, seconds)
    return Timed(call, each, forward / len(batch.input_ids), backward, peak, answers)


def _first(batch: Batch, rows: int) -> Batch:
    return batch.rows(torch.arange(min(rows, len(batch.input_ids)), device=batch.input_ids.device))


def _back_propagated(run: Run) -> int:
    """Rows that go back through the network at once."""
    config = run.config
    first_order = [name for name in _methods(run) if not METHODS[name].zeroth_order]
    return max([config.answers_a_step(name) for name in first_order] or [config.sft_batch_size])


def _kept_at_once(run: Run, data: Data) -> int:
    """Rows whose activations are all kept for a backward pass, padded to the longest: of a pair both answers."""
    config = run.config
    kept = [name for name in _methods(run) if METHODS[name].uses == BACK_PROPAGATION and name != CHECKPOINTED]
    rows = [config.answers_a_step(name) for name in kept]
    rows += [config.sft_batch_size] if config.sft_steps else []
    rows += [(1 if data.regressed else 2) * config.reward_batch_size] if config.trains_reward else []
    return max(rows, default=0)


def _of_whole_models(run: Run, model: torch.nn.Module) -> float:
    """MB that training all parameters keeps: their gradients, AdamW's two moments, and TRL's reference policy."""
    config, methods = run.config, [METHODS[name] for name in _methods(run)]
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters()) / 1e6
    moments = config.sft_steps or any(not method.zeroth_order for method in methods)
    reference = config.beta and not all(method.population for method in methods)
    return size * (3 * bool(moments) + bool(reference))


def _methods(run: Run) -> list[str]:
    return [run.config.method_of(iteration) for iteration in range(run.config.iterations)]


def fitted(few: int, first: float, many: int, second: float) -> tuple[float, float]:
    """Seconds of a batch's own and of each answer in it, of two timed batches; an answer is never free.

    >>> fitted(1, 2.0, 9, 4.0)
    (1.75, 0.25)
    >>> fitted(8, 2.0, 8, 4.0)
    (0.0, 0.5)
    """
    if many == few:
        return 0.0, second / many
    each = min(max((second - first) / (many - few), second / many / 8), second / many)
    return second - many * each, each


def _timed(models: Models, work: Any, once: bool = False) -> tuple[float, Any]:
    """Seconds of a call and its result; on a GPU of the second one (but `once`): the first captures and loads kernels."""
    on_gpu = models.base.device.type == "cuda"
    with torch.enable_grad():
        if on_gpu and not once:
            work()
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        found = work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began, found


def _goes_back(run: Run) -> bool:
    """Whether any stage takes a gradient."""
    config = run.config
    policy = any(not METHODS[name].zeroth_order for name in _methods(run))
    return not config.served and bool(config.sft_steps or config.trains_reward or policy)


def seconds_of(
    name: str, first: bool, method: str, config: RunConfig, steps: int, timed: Timed, regressed: bool = False
) -> float:
    """What a stage takes. Pairs of answers are two, a reward is a pass, and a row to learn from is as long as an answer.

    Args:
        name: of the stage. first: it is the evaluation of the SFT policy. method: of its iteration. steps: of a policy.
            regressed: the reward model learns scores of single answers.

    >>> config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=2, num_generations=2, beta=0.0)
    >>> timed = Timed(call=0.0, sample=3.0, forward=0.5, backward=1.5, peak_mb=100.0, answers=4)
    >>> seconds_of("policy", False, "rloo", config, 10, timed)  # 4 answers, their rewards and gradients, 10 times
    200.0
    >>> seconds_of("policy", False, "mezo", config, 10, timed)  # in place of the gradient both sides of a difference
    180.0
    """
    scored = timed.forward if config.trains_reward else 0.0
    if name == "policy":
        return steps * _step_seconds(method, config, timed, scored)
    if name == "sft":
        return config.sft_steps * config.sft_batch_size * timed.backward if config.sft_steps else 0.0
    if name == "reward":
        return config.reward_steps * (1 if regressed else 2) * config.reward_batch_size * timed.backward
    if name == "refine":
        return config.refine_steps * 2 * config.reward_batch_size * timed.backward
    if name == "pairs":
        return _drawn((1 + config.uncertain_share) * config.pair_prompts, config, timed, scored)
    assert name == EVALUATION, name
    drawn = config.eval_prompts * (config.eval_samples + config.eval_greedy)
    drawn += config.eval_prompts if config.other_data and not first else 0
    compared = 0 if first else config.eval_prompts * (config.eval_samples + bool(config.other_data))
    return _drawn(drawn, config, timed, scored) + compared * timed.forward


def _drawn(answers: float, config: RunConfig, timed: Timed, scored: float) -> float:
    return answers * (timed.sample + scored + timed.call / config.eval_batch_size)


def _step_seconds(method: str, config: RunConfig, timed: Timed, scored: float) -> float:
    chosen = METHODS[method]
    answers = config.answers_a_step(method)
    each = timed.sample + scored
    if not chosen.population:
        queries, sides = config.differences_of(method)
        each += queries * sides * timed.forward if chosen.zeroth_order else timed.backward
        each += timed.forward if config.beta else 0.0  # of the SFT policy
    return timed.call + answers * each


@dataclass(frozen=True)
class Estimate:
    """stages: that are not done, with their iterations and seconds. timed: what it is made from."""

    stages: Sequence[tuple[Stage, int | None, float]]
    timed: Timed

    @property
    def seconds(self) -> float:
        return sum(seconds for _, _, seconds in self.stages)

    def around(self, stage: Stage, iteration: int | None) -> tuple[float, float, float]:
        """Seconds of the stages before this one, of itself, and of those after it."""
        places = [(other, number) for other, number, _ in self.stages]
        at = places.index((stage, iteration)) if (stage, iteration) in places else 0  # it was done, and is not any more
        seconds = [each for _, _, each in self.stages]
        return sum(seconds[:at]), seconds[at], sum(seconds[at + 1 :])

    def line(self) -> str:
        """In a few words."""
        timed = self.timed
        return (
            f"this run will take about {duration(self.seconds)} and {timed.peak_mb / 1e3:.1f} GB, by one timed step "
            f"({timed.answers} answers, {duration(timed.call + timed.answers * timed.sample)} to sample them): "
            "an estimate, which the run corrects as it goes"
        )


def estimate(run: Run, models: Models, data: Data) -> Estimate:
    """Time a step, and say what each stage that is not done will take."""
    timed, config = time_step(run, models, data), _bounded(run, data)
    about = config, policy_steps(run, data), timed, data.regressed
    stages = [
        (stage, number, seconds_of(stage.name, number is None, config.method_of(number or 0), *about))
        for stage, number in walk(config, config.iterations)
        if not stage.done(run.store, number)
    ]
    return Estimate(stages, timed)


def dry_run(config: RunConfig) -> tuple[dict[str, Any], Page]:
    """What `zopro run` would do and take, as an object and as text; nothing is written. Raises InputError as it would."""
    check_folder(Path(config.output_dir or default_folder(config)), config, resume=False)
    run, models, data = open_all(config, writes=False)
    run.say_unheeded()
    found = estimate(run, models, data)
    result = {
        "rows": data.rows,
        "policy_steps": policy_steps(run, data),
        "stages": [
            {
                "stage": stage.name,
                "iteration": number,
                "work": _work(run, data, stage, number),
                "seconds": round(seconds, 1),
            }
            for stage, number, seconds in found.stages
        ],
        "seconds": round(found.seconds, 1),
        "peak_mb": round(found.timed.peak_mb, 1),
    }
    return result, Page(*_text(result, found))


def _bounded(run: Run, data: Data) -> RunConfig:
    """The run's configuration, with no more prompts than there are."""
    pairs = min(run.config.pair_prompts, len({item.prompt for item in data.train}))
    return dataclasses.replace(run.config, eval_prompts=len(data.eval), pair_prompts=pairs)


def _work(run: Run, data: Data, stage: Stage, iteration: int | None) -> str:
    config = _bounded(run, data)
    answers = config.answers_a_step(config.method_of(iteration or 0))
    measured = config.eval_samples + config.eval_greedy
    return {
        "sft": f"{config.sft_steps} steps of {config.sft_batch_size} rows",
        "reward": f"{config.reward_steps} steps of {config.reward_batch_size} {'rows' if data.regressed else 'pairs'}",
        EVALUATION: f"{config.eval_prompts} prompts, {measured} answer{'s' * (measured > 1)} each",
        "policy": f"{policy_steps(run, data)} steps of {config.method_of(iteration or 0)}, {answers} answers each",
        "pairs": f"{config.pair_prompts} prompts, the least certain {config.uncertain_share:.0%} judged",
        "refine": f"{config.refine_steps} steps of {config.reward_batch_size} pairs",
    }[stage.name]


def _text(result: dict[str, Any], found: Estimate) -> Iterator[str | Table]:
    yield f"rows   {result['rows']}"
    yield ""
    rows = [("stage", "work", "about")]
    rows += [
        (s.title(i), line["work"], duration(t)) for (s, i, t), line in zip(found.stages, result["stages"], strict=True)
    ]
    yield Table(rows)
    yield ""
    yield found.line()
    yield "nothing was written"
