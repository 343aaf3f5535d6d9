"""The policy stage of one iteration: its prompts, the method's trainer, and the training itself.

`policy_trainer` is also what a comparison trains with (`zopro.compare`), so that both give a method the same things.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zopro.config import RATE_KEYS, RunConfig
from zopro.errors import diverging
from zopro.loop.recording import Origin, Recorder, origin_of
from zopro.loop.session import Item, Session
from zopro.store.rundir import whole_folder
from zopro.system.random_state import preserve_random_state
from zopro.train.callbacks import be_quiet
from zopro.train.checkpoints import fit
from zopro.train.methods import LEARNING_RATES, METHODS, SELF_STARTING, ZEROTH_ORDER, PolicyInputs


def policy_steps(session: Session) -> int:
    """Steps of one iteration: as configured, or what iteration_share of the training prompts amounts to."""
    config = session.config
    return config.policy_steps or math.ceil(config.iteration_share * len(session.train) / config.prompts_per_step)


def iteration_items(session: Session, iteration: int, count: int) -> list[Item]:
    """The `count` training items of one iteration: the next ones in order, around and around."""
    start = iteration * policy_steps(session) * session.config.prompts_per_step
    return [session.train[(start + i) % len(session.train)] for i in range(count)]


@contextmanager
def policy_trainer(
    session: Session, origin: Origin, items: Sequence[Item], reward: int, config: RunConfig | None = None, **given: Any
) -> Iterator[tuple[Any, Any]]:
    """The trainer of a method and its model, ready to train from `origin` on.

    Args:
        items: what is answered, in order; `prompts_per_step` of them in each step.
        reward: which iteration's reward model scores the answers.
        config: in place of the session's.
        given: further fields of `PolicyInputs` (steps, seed, folder).
    """
    policies, config = session.policies, config or session.config
    mu = policies.update(*origin.previous_update) if origin.previous_update else {}
    v = policies.reward_update(*origin.reward_update) if origin.reward_update else {}
    with policies.open(origin.start, trainable=True) as model, preserve_random_state():
        model.config._name_or_path = str(origin.start if policies.full else config.model)
        inputs = PolicyInputs(
            model=model,
            tokenizer=session.tokenizer,
            reward_function=session.reward_model(reward).as_reward_function(config.eval_batch_size),
            prompts=[item.prompt for item in items],
            rows=[item.example.row for item in items],
            config=config,
            previous_update=mu,
            reward_update=v,
            reference=policies.reference(session.directory.sft()),
            writes=session.directory.writes,
            **given,
        )
        trainer = METHODS[origin.method](inputs)
        trainer.eos_token_ids = session.eos_token_ids  # more than the model declares
        be_quiet(trainer)
        yield trainer, model


def shared(session: Session, iteration: int) -> bool:
    """Whether ranks can share the policy stage of an iteration: its steps are zeroth-order."""
    return _origin(session, iteration).method in ZEROTH_ORDER


def _origin(session: Session, iteration: int) -> Origin:
    config = session.config
    return origin_of(config, session.directory, iteration, config.method in SELF_STARTING)


def train_policy(session: Session, iteration: int) -> None:
    """Optimise the policy against the current reward model, by `method` or, in iteration 0, by the warm start.

    On many ranks all of them are here if the stage is `shared`, else the first one is.
    """
    config, directory, policies = session.config, session.directory, session.policies
    origin = _origin(session, iteration)
    steps, seed = policy_steps(session), session.seed("policy", iteration)
    items = iteration_items(session, iteration, steps * config.prompts_per_step)
    training: dict[str, Any] = {"steps": steps, "seed": seed, "folder": directory.trainer("policy", iteration)}
    key = RATE_KEYS.get(origin.method, "learning_rate")
    with (
        diverging(key, getattr(config, key) or LEARNING_RATES[config.preset]),
        policy_trainer(session, origin, items, iteration, **training) as (trainer, model),
        directory.new_folder(directory.policy(iteration)) as folder,
    ):

        def save(snapshot: Path) -> None:
            with whole_folder(snapshot) as partial:
                policies.save(model, partial)

        for callback in (session.callback("policy", iteration), *session.snapshots("policy", iteration, save)):
            trainer.add_callback(callback)
        journal = directory.iteration(iteration) / "journal.jsonl"
        Recorder(trainer, journal, origin, rebuild=policies.full, writes=directory.writes).attach()
        fit(trainer)
        if folder is not None:
            policies.save(model, folder)
