"""The policy stage of one iteration: its prompts, the method's trainer, and the training itself.

`policy_trainer` is also what a comparison trains with (`zopro.compare`), so that both give a method the same things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.errors import diverging
from zopro.loop.bound import BoundCallback
from zopro.loop.data import Data, Item
from zopro.loop.models import Models
from zopro.loop.reach import ReachCallback
from zopro.loop.recording import Origin, Recorder, origin_of
from zopro.loop.run import Run
from zopro.loop.trainers import trainer_of
from zopro.loop.unended import UnendedCallback
from zopro.loop.unscored import unscored
from zopro.store import shown
from zopro.store.rundir import whole_folder
from zopro.system import progress
from zopro.system.random_state import preserve_random_state
from zopro.train.callbacks import be_quiet
from zopro.train.checkpoints import fit
from zopro.train.methods import PolicyInputs


def policy_steps(run: Run, data: Data) -> int:
    """Steps of one iteration: as configured, or what iteration_share of the training prompts amounts to."""
    config = run.config
    return config.policy_steps or math.ceil(config.iteration_share * len(data.train) / config.prompts_per_step)


def iteration_items(run: Run, data: Data, iteration: int, count: int) -> list[Item]:
    """The `count` training items of one iteration: the next ones in order, around and around."""
    start = iteration * policy_steps(run, data) * run.config.prompts_per_step
    return [data.train[(start + i) % len(data.train)] for i in range(count)]


@contextmanager
def policy_trainer(
    run: Run, models: Models, origin: Origin, items: Sequence[Item], steps: int, seed: int, folder: Path
) -> Iterator[tuple[Any, Any]]:
    """The trainer of a method and its model, ready to train from `origin` on.

    Args:
        items: what is answered, in order; `prompts_per_step` of them in each step.
        folder: where the trainer may write.
    """
    config, policies, store = run.config, models.policies, run.store
    mu = policies.update(*origin.previous_update) if origin.previous_update else {}
    v = policies.reward_update(*origin.reward_update) if origin.reward_update else {}
    where = f"policy {origin.iteration}"
    with (
        policies.open(origin.start, trainable=True) as model,
        preserve_random_state(),
        unscored(where, run.say) as count,
    ):
        # Whence TRL loads the reference policy where there is no adapter to take away.
        model.config._name_or_path = str(store.sft() if policies.full else config.model)
        rewards = models.rewards_with(store.reward(origin.iteration))
        inputs = PolicyInputs(
            model=model,
            tokenizer=models.tokenizer,
            reward_function=rewards.as_reward_function(items, count),
            prompts=[item.prompt for item in items],
            rows=[item.example.row for item in items],
            config=config,
            previous_update=mu,
            reward_update=v,
            reference=policies.reference(store.sft()),
            eps_guess=origin.eps,
            writes=store.writes,
            steps=steps,
            seed=seed,
            folder=folder,
        )
        trainer: Any = trainer_of(origin.method, inputs)
        trainer.eos_token_ids = models.eos_token_ids  # more than the model declares
        be_quiet(trainer)
        trainer.clock = progress.Spans()
        if getattr(trainer, "follows_update", False) and not (origin.iteration or config.sft_steps):
            run.say("policy 0: without SFT steps there is no update to follow, so steps go along noise alone")
        for line in _missing(config, origin.method, mu, v):
            run.say(f"{where}: {line}")
        yield trainer, model


def _missing(config: RunConfig, method: str, mu: Mapping[str, Tensor], v: Mapping[str, Tensor]) -> Iterator[str]:
    """A line for each key that asks for an update which is not there."""
    follows = {"targeted": config.targeted and method == "es"}
    follows |= {"guide: mixed": config.guide == "mixed" and method == "guided"}
    for key in (key for key, asked in follows.items() if asked and not mu):
        yield f"{key}: there is no update yet to follow, and noise takes its place"
    if config.guide_avoid_reward and method == "guided" and not v:
        yield "guide_avoid_reward: there is no update of a reward model to avoid"


def ranks_share(run: Run, iteration: int) -> bool:
    """Whether ranks can share the policy stage of an iteration: its steps are zeroth-order."""
    return METHODS[run.config.method_of(iteration)].zeroth_order


def _origin(run: Run, iteration: int) -> Origin:
    config = run.config
    return origin_of(config, run.store, iteration, None if METHODS[config.method].self_starting else config.warm_start)


def train_policy(run: Run, models: Models, data: Data, iteration: int) -> None:
    """Optimise the policy against the current reward model, by `method` or, in iteration 0, by the warm start.

    On many ranks all of them are here if `ranks_share` the stage, else the first one is.
    """
    config, store, policies = run.config, run.store, models.policies
    origin = _origin(run, iteration)
    if not iteration and METHODS[config.method].self_starting and config.changed("warm_start"):
        run.say(f"policy 0: {config.method} starts by itself, whatever warm_start says")
    if iteration and origin.previous_update and origin.previous_update[0] != origin.start:
        made = origin.name(origin.previous_update[0])
        run.say(f"policy {iteration}: the iteration before left the policy as it was; mu is the update that made {made}")
    steps, seed, at = policy_steps(run, data), run.seed("policy", iteration), store.trainer("policy", iteration)
    items = iteration_items(run, data, iteration, steps * config.prompts_per_step)
    method = METHODS[origin.method]
    with (
        policy_trainer(run, models, origin, items, steps, seed, at) as (trainer, model),
        diverging(method.rate, rate := getattr(config, method.rate) or trainer.args.learning_rate),
        store.new_folder(store.policy(iteration)) as folder,
    ):

        def save(snapshot: Path) -> None:
            with whole_folder(snapshot) as partial:
                policies.save(model, partial)

        answers, limit = config.answers_a_step(origin.method), config.max_completion_length
        where, follows = f"policy {iteration}", getattr(trainer, "follows_update", False)
        start = shown.start(config.sft_steps).the
        notes = [
            UnendedCallback(run.say, where, answers, limit),
            ReachCallback(run.say, where, method.rate, rate, follows),
            *([BoundCallback(config.max_kl, run.say, where, method.rate, start)] if config.max_kl else []),
        ]
        for callback in (run.callback("policy", iteration), *run.snapshots("policy", iteration, save), *notes):
            trainer.add_callback(callback)
        Recorder(trainer, store.journal(iteration), origin, rebuild=policies.full, writes=store.writes).attach()
        fit(trainer)
        if folder is not None:
            policies.save(model, folder)
