"""One job of a comparison: prepares the shared work, measures inference, or trains a method."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import SchedulerType, TrainerCallback

from zopro.choices import METHODS
from zopro.compare.kept import SAMPLES, once, result_of
from zopro.compare.plan import Job
from zopro.config import RunConfig
from zopro.loop import answers
from zopro.loop.bound import BoundCallback
from zopro.loop.data import Data, Item
from zopro.loop.learned import held_out_quality
from zopro.loop.models import Models
from zopro.loop.opening import open_all
from zopro.loop.policy_stage import policy_trainer
from zopro.loop.recording import origin_of
from zopro.loop.remembered import ask
from zopro.loop.rewarding import Scores
from zopro.loop.run import Run
from zopro.loop.table import EVALUATION, walk
from zopro.store import shown
from zopro.store.layout import Layout
from zopro.store.shown import PER_ANSWER
from zopro.system.memory import PeakMemory
from zopro.system.statistics import known_mean
from zopro.system.threads import torch_threads
from zopro.tasks.metrics import metric
from zopro.text.degenerate import degenerate
from zopro.train.checkpoints import clear

INFERENCE_BATCHES = 3
SHOWN = 3  # prompts whose answers are kept for the page


def do_job(job: Job, config: RunConfig, folder: Path) -> dict[str, Any]:
    """Do the job, with as many threads as the comparison was begun with, and return what result.json says."""
    opened = open_all(config, resume=Layout(config.output_dir).config().exists())
    with torch_threads(opened[0].store.threads()):
        if job.kind == "prepare":
            return _prepare(*opened, job)
        if job.kind == "inference":
            return _inference(*opened, job)
        return _train(*opened, job, folder)


def _prepare(run: Run, models: Models, data: Data, job: Job) -> dict[str, Any]:
    """The stages of a run up to what every training starts from, each of which may be done already."""
    for stage, iteration in walk(run.config, _iteration(job)):
        if stage.name != EVALUATION and not stage.done(run.store, iteration):
            stage.work(run, models, data, iteration)
    start = run.store.sft() if job.start == "sft" else run.store.policy(0)
    samples = run.config.eval_samples
    found = {
        "start": {**measure(run, models, data, start, job, samples, whole=True), SAMPLES: samples},
        "rows": data.rows,
    }
    if job.start == "iteration" and run.config.trains_reward:
        refined = models.reward_from(run.store.reward(_iteration(job)))
        found["reward_quality"] = held_out_quality(refined, data, run.config.eval_batch_size)
    return found


def _iteration(job: Job) -> int:
    """The iteration that a training is: 0, from the SFT policy, or 1."""
    return 0 if job.start == "sft" else 1


def _inference(run: Run, models: Models, data: Data, job: Job) -> dict[str, Any]:
    """Peak memory of sampling a step's batch, in a process that holds all that training holds but does not train."""
    config = run.config
    items = training_items(run, data)
    untrained = replace(job, method="mezo", steps=1)
    with job_trainer(run, models, data, untrained, run.store.trainer("inference")) as (_, model):
        memory = PeakMemory(models.base.device)
        for number in range(INFERENCE_BATCHES):
            first = number * config.prompts_per_step
            batch = [items[(first + i) % len(items)] for i in range(config.prompts_per_step)]
            answers.sample(run, models, model, batch, number, config.num_generations)
        return {"peak_mb": memory.peak_mb()}


def search_items(run: Run, data: Data) -> list[Item]:
    """Rows for the choice of learning rates, each of another prompt, which no method trains on where there are enough."""
    by_prompt: dict[str, Item] = {}
    for item in reversed(data.train):
        by_prompt.setdefault(item.prompt, item)
    count = min(run.config.eval_prompts, max(1, len(by_prompt) // 4))
    return [*by_prompt.values()][:count][::-1]


def training_items(run: Run, data: Data) -> list[Item]:
    """The prompts of the policy stage, the same for every method."""
    searched = {item.prompt for item in search_items(run, data)}
    return [item for item in data.train if item.prompt not in searched] or data.train


@contextmanager
def job_trainer(run: Run, models: Models, data: Data, job: Job, folder: Path) -> Iterator[tuple[Any, Any]]:
    """The trainer of the job's method and its model, ready to train from the policy that all start from."""
    items = training_items(run, data)
    chosen = [items[i % len(items)] for i in range(job.steps * run.config.prompts_per_step)]
    options: dict[str, Any] = {"method": job.method, METHODS[job.method].rate: job.learning_rate}
    run = replace(run, config=replace(run.config, checkpoint_steps=0, **options))
    origin = origin_of(run.config, run.store, _iteration(job), start="sft")
    with policy_trainer(run, models, origin, chosen, job.steps, job.seed, folder) as (trainer, model):
        trainer.args.lr_scheduler_type = SchedulerType.CONSTANT  # a budget may end any training early
        yield trainer, model


def _train(run: Run, models: Models, data: Data, job: Job, folder: Path) -> dict[str, Any]:
    """What training and measuring find, each of which may be done already."""
    train = partial(_trained, run, models, data, job, folder)
    found = once(folder / "trained.json", ("points", "steps", "seconds", "peak_mb"), train)
    samples, points = samples_of(folder.parent, job), list[dict[str, Any]]()
    for number, (step, seconds) in enumerate(found["points"], 1):
        policy, last = _point(folder, step), number == len(found["points"])
        look = partial(measure, run, models, data, policy, job, samples, whole=last)
        measured = once(policy.with_suffix(".json"), ("rewards", PER_ANSWER), look)
        points.append({"step": step, "seconds": seconds, **measured})
    return {**found, "points": points}


def _point(folder: Path, step: int) -> Path:
    return folder / "points" / f"{step:06d}"


def _trained(run: Run, models: Models, data: Data, job: Job, folder: Path) -> dict[str, Any]:
    pace = Pace(job)
    for left in ("points", "trainer"):  # by a training that did not end; rewards that are kept would cost no time
        shutil.rmtree(folder / left, ignore_errors=True)
    with job_trainer(run, models, data, job, folder / "trainer") as (trainer, model):
        trainer.add_callback(pace)
        if run.config.max_kl and not METHODS[job.method].population:  # whose steps measure no KL
            where, rate = f"{job.method}, seed {job.seed}", METHODS[job.method].rate
            the_start = shown.start(run.config.sft_steps).the
            trainer.add_callback(BoundCallback(run.config.max_kl, run.say, where, rate, the_start))
        pace.save = lambda step: models.policies.save(model, _point(folder, step))
        memory = PeakMemory(models.base.device)
        trainer.train()
        peak = memory.peak_mb()
    clear(folder / "trainer")
    rewards = [line["reward"] for line in trainer.state.log_history if "reward" in line]
    return {
        "points": pace.points, "steps": pace.steps, "seconds": pace.seconds, "peak_mb": peak, "training_reward": rewards,
        "bounded": pace.steps < job.steps and not pace.over,
    }  # fmt: skip


class Pace(TrainerCallback):
    """Keeps the policy at the marks and at the end, stops at the budget, and tells the time of training alone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.save: Callable[[int], None] = lambda step: None
        self.marks = job.marks() if job.points else []
        self.points: list[tuple[int, float]] = []
        self.steps, self.seconds, self.over = 0, 0.0, False
        self._since = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self._since
        self.steps = state.global_step
        self.over = 0 < self.job.budget_seconds <= self.seconds
        if self.job.points and (state.global_step in self.marks or self.over):
            self._keep(state.global_step)
        if self.over:
            control.should_training_stop = True
        self._since = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.job.points and self.steps not in [step for step, _ in self.points]:  # max_kl has ended it
            self._keep(self.steps)

    def _keep(self, step: int) -> None:
        self.points.append((step, self.seconds))
        self.save(step)


def samples_of(jobs: Path, job: Job) -> int:
    """How many answers to each held-out prompt the start was measured by: by so many are trainings. Earlier versions took
    one, whatever the configuration said."""
    begun = Job("prepare", job.start)
    return int(result_of(jobs / begun.name / "result.json", begun)["start"].get(SAMPLES, 1))


def measure(
    run: Run, models: Models, data: Data, policy: Path, job: Job, samples: int, whole: bool = False
) -> dict[str, Any]:
    """The mean reward of each held-out prompt's `samples` answers (of one to each search prompt), the answers'
    log-ratios to the SFT policy, in nats, and the first ones as texts. With `whole`, on held-out prompts, also what
    `zopro.compare.state` reads."""
    tested, known = job.prompts == "test", list[bool]()
    items = data.eval if tested else search_items(run, data)
    count = samples if tested else 1

    def question(model: Any) -> None:
        known.extend(right for _, right in ask(run, models, model) or ())

    rewards, seed = models.rewards_with(run.store.reward(_iteration(job))), run.seed("compare", job.prompts, job.seed)
    found = answers.measure(run, models, items, policy, seed, rewards, count, also=question if whole and tested else None)
    texts = models.texts(found.ids if whole else found.ids[: SHOWN * count])
    first = [
        {"prompt": item.prompt, "completion": text, "reward": 0.0 if math.isnan(reward) else reward}
        for item, text, reward in zip(items[:SHOWN], texts[::count], found.scores.total[::count], strict=False)
    ]
    rewarded = [mean or 0.0 for mean in prompt_means(found.scores.total, count)]  # so that all methods are paired
    measured: dict[str, Any] = {"rewards": rewarded, PER_ANSWER: found.log_ratios, "texts": first}
    if whole and tested:
        asked = [item for item in items for _ in range(count)]
        measured["degenerate"] = prompt_means(
            [
                degenerate(text, item.example.asked, item.example.reference) is not None
                for text, item in zip(texts, asked, strict=True)
            ],
            count,
        )
        measured["ended"] = prompt_means(answers.ends(models, found.ids), count)
        measured["length"] = prompt_means([*map(len, found.ids)], count)
        measured["quality"] = {
            name: prompt_means(values, count) for name, values in _qualities(data, found.scores, texts, asked).items()
        }
        measured["known"] = known
        measured["other"] = answers.divergences(run, models, data.other, policy, run.seed("compare", "other", job.seed))
    return measured


def prompt_means(values: Sequence[float | None], count: int) -> list[float | None]:
    """The mean of each prompt's `count` values, of those that are numbers; None where none is.

    >>> prompt_means([1.0, 0.0, None, 0.5, None, float("nan")], 2)
    [0.5, 0.5, None]
    """
    numbers = [math.nan if value is None else float(value) for value in values]
    means = (known_mean(numbers[first : first + count]) for first in range(0, len(numbers), count))
    return [None if math.isnan(mean) else mean for mean in means]


def _qualities(data: Data, scores: Scores, texts: Sequence[str], items: Sequence[Item]) -> dict[str, Any]:
    """Each answer by each of several rewards, and by the task's metric (chrF, ROUGE; 0 to 100), [answer]; NaN or None
    where one does not apply."""
    found: dict[str, Any] = dict(scores.parts) if len(scores.parts) > 1 else {}
    name = data.task.metric
    if name is not None and name not in scores.parts:
        found[name] = metric(name)(texts, [item.example.reference for item in items])
    return found
