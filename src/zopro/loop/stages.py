"""The stages of one run, each a function of a `Session` that leaves its output whole in the run directory.

SFT -> reward model -> per iteration: policy, sampled pairs, judge, refined reward model (the paper). A stage
whose output is there is skipped by `pipeline.run`; each is given the session and, inside the loop, the iteration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.data_utils import common_prefix_length

from zopro.errors import InputError, diverging
from zopro.loop.policy_stage import iteration_items
from zopro.loop.session import Item, Session, batches, trimmed
from zopro.rewards import Pair, Scored
from zopro.rewards.sequences import Sequences
from zopro.store import shown
from zopro.store.rundir import read_rows, whole_folder
from zopro.system.random_state import preserve_random_state
from zopro.train.arguments import quiet_arguments
from zopro.train.callbacks import be_quiet
from zopro.train.checkpoints import checkpointed, fit


def train_sft(session: Session) -> None:
    """Supervised fine-tuning on prompts and chosen answers; only answers that end within the limit are used."""
    config, directory = session.config, session.directory
    if not session.policies.full and not directory.initial().exists():
        with session.policies.open(None) as model, whole_folder(directory.initial()) as folder:
            session.policies.save(model, folder)
    rows = [item for item in session.train if session.answers_fit(item.example.chosen)]
    if not rows:
        raise InputError(
            f"max_completion_length: no chosen answer ends within {config.max_completion_length} tokens. Raise it."
        )
    session.say(f"SFT on {len(rows)} of {len(session.train)} rows (answers that fit max_completion_length)")
    start = None if session.policies.full else directory.initial()
    rate = diverging("sft_learning_rate", config.sft_learning_rate)
    with rate, session.policies.open(start, trainable=True) as model, whole_folder(directory.sft()) as folder:
        if config.sft_steps:
            _fit_sft(session, model, rows)
        session.policies.save(model, folder)


def _fit_sft(session: Session, model: Any, rows: Sequence[Item]) -> None:
    config = session.config
    arguments = quiet_arguments(
        SFTConfig,
        output_dir=session.directory.trainer("sft", None),
        steps=config.sft_steps,
        batch_size=config.sft_batch_size,
        learning_rate=config.sft_learning_rate,
        seed=session.seed("sft"),
        device=session.base.device,
        report_to=config.report_to,
        checkpoint_steps=config.checkpoint_steps,
        max_length=session.max_length,
        completion_only_loss=True,
    )
    sequences, _ = Sequences(session.tokenizer, session.max_length, session.frame).from_text(
        [item.prompt for item in rows], [item.example.chosen for item in rows]
    )
    begins = [common_prefix_length(item.ids, ids) for item, ids in zip(rows, sequences, strict=True)]
    masks = [[0] * begin + [1] * (len(ids) - begin) for begin, ids in zip(begins, sequences, strict=True)]
    with preserve_random_state():
        trainer = checkpointed(SFTTrainer)(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": sequences, "completion_mask": masks}),
            processing_class=session.tokenizer,
            callbacks=[session.callback("sft", None)],
        )
        be_quiet(trainer)
        fit(trainer)


def train_reward(session: Session) -> None:
    """The first reward model: pairwise, or by regression on direct-assessment scores where the task has those."""
    with diverging("reward_learning_rate", session.config.reward_learning_rate):
        _train_reward(session)


def _train_reward(session: Session) -> None:
    config, directory = session.config, session.directory
    model = session.reward_model(None)
    options: dict[str, Any] = {
        "steps": config.reward_steps,
        "batch_size": config.reward_batch_size,
        "learning_rate": config.reward_learning_rate,
        "seed": session.seed("reward"),
        "callbacks": [session.callback("reward", None)],
        "report_to": config.report_to,
        "output_dir": directory.trainer("reward", None),
        "checkpoint_steps": config.checkpoint_steps,
    }
    if session.task.reward == "regression":
        rows = scored(session.train, session.answers_fit)
        if len({row.score for row in rows}) < 2:
            raise InputError(_no_answer_fits(config.max_completion_length, "two different scores"))
        model.train_scores(rows, **options)
        held_out = scored(session.eval)
        measured = len({row.score for row in held_out}) > 1
        quality = model.correlation(held_out, config.eval_batch_size) if measured else {}
    else:
        judged = pairs(session.train, session.answers_fit)
        if not judged:
            raise InputError(_no_answer_fits(config.max_completion_length, "a chosen and a rejected answer"))
        model.train_pairs(judged, **options)
        held_out_pairs = pairs(session.eval)
        quality = model.accuracy(held_out_pairs, config.eval_batch_size) if held_out_pairs else {}
    directory.log({"stage": "reward", "iteration": None, "step": None, "event": "quality", **quality})
    model.save(directory.reward(0))
    session.say(f"reward model on held-out rows: {shown.quality(quality)}")


def _no_answer_fits(limit: int, what: str) -> str:
    return (
        f"train_data: must have {what} that end within max_completion_length={limit} tokens, got none. Raise "
        "max_completion_length, or choose another task."
    )


def pairs(items: Sequence[Item], fit: Callable[..., bool] | None = None) -> list[Pair]:
    """The items' chosen and rejected answers; with `fit`, of those whose two answers fit."""
    return [
        Pair(item.prompt, item.example.chosen, item.example.rejected)
        for item in items
        if item.example.rejected is not None and (fit is None or fit(item.example.chosen, item.example.rejected))
    ]


def scored(items: Sequence[Item], fit: Callable[..., bool] | None = None) -> list[Scored]:
    """The items' answers with their direct-assessment scores; with `fit`, of those that fit."""
    return [
        Scored(item.prompt, item.example.chosen, item.example.score)
        for item in items
        if item.example.score is not None and (fit is None or fit(item.example.chosen))
    ]


def sample_pairs(session: Session, iteration: int) -> None:
    """Sample, keep the answers whose reward is nearest zero, draw a second one for each, and let the judge choose.

    samples.jsonl has every first answer and its reward; preferences.jsonl the judged pairs. All lists are made from
    the same rows in the same order, so prompts, answers, references and rewards stay aligned.
    """
    config, directory = session.config, session.directory
    items = _distinct(iteration_items(session, iteration, len(session.train)))[: config.pair_prompts]
    reward = session.reward_model(iteration)
    with session.policies.open(directory.policy(iteration)) as model:
        rows = _answers(session, model, items, session.seed("samples", iteration))
        for row, value in zip(rows, _rewards(session, reward, rows), strict=True):
            row["reward"] = value
        count = math.ceil(config.uncertain_share * len(rows))
        uncertain = sorted(rows, key=lambda row: abs(row["reward"]))[:count]
        seconds = _answers(session, model, [row["item"] for row in uncertain], session.seed("second", iteration))
    for second, value in zip(seconds, _rewards(session, reward, seconds), strict=True):
        second["reward"] = value
    result = session.judged(
        "pairs",
        iteration,
        [row["prompt"] for row in uncertain],
        [[a["completion"], b["completion"]] for a, b in zip(uncertain, seconds, strict=True)],
        [row["item"].example.reference for row in uncertain],
    )
    preferences = []
    for first, second, winner in zip(uncertain, seconds, result.winners, strict=True):
        if winner >= 0:
            chosen, rejected = (first, second) if winner == 0 else (second, first)
            preferences.append(
                {
                    "prompt": first["prompt"],
                    "chosen": chosen["completion"],
                    "rejected": rejected["completion"],
                    "chosen_reward": chosen["reward"],
                    "rejected_reward": rejected["reward"],
                    "row": first["item"].example.row,
                }
            )
    kept = {id(row) for row in uncertain}
    samples = [
        {"prompt": r["prompt"], "completion": r["completion"], "reward": r["reward"], "kept": id(r) in kept,
         "row": r["item"].example.row}
        for r in rows
    ]  # fmt: skip
    numbers = {"samples": len(rows), "judged": len(uncertain), "pairs": len(preferences)}
    counts = {"ties": result.ties, "invalid": result.invalid, "reasons": result.reasons}
    directory.log({"stage": "pairs", "iteration": iteration, "step": None, **numbers, **counts})
    directory.write_rows(directory.iteration(iteration) / "samples.jsonl", samples)
    directory.write_rows(directory.iteration(iteration) / "preferences.jsonl", preferences)
    session.say(
        f"iteration {iteration}: {len(preferences)} pairs from {len(uncertain)} judged "
        f"({result.ties} ties, {result.invalid} invalid verdicts)"
        + ("; nothing to refine the reward model on" if not preferences else "")
    )


def refine_reward(session: Session, iteration: int) -> None:
    """Train the reward model on the judged pairs, interpolate it with its predecessor, and save what will be used."""
    with diverging("refine_learning_rate", session.config.refine_learning_rate):
        _refine_reward(session, iteration)


def _refine_reward(session: Session, iteration: int) -> None:
    config, directory = session.config, session.directory
    rows = read_rows(directory.iteration(iteration) / "preferences.jsonl")
    model = session.reward_model(iteration)
    judged = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    if judged:
        previous = model.state()
        before = model.accuracy(judged, config.eval_batch_size)["accuracy"]
        model.train_pairs(
            judged,
            steps=config.refine_steps,
            batch_size=min(config.reward_batch_size, len(judged)),
            learning_rate=config.refine_learning_rate,
            seed=session.seed("refine", iteration),
            callbacks=[session.callback("refine", iteration), *session.snapshots("reward", iteration, model.save)],
            report_to=config.report_to,
            output_dir=directory.trainer("refine", iteration),
            checkpoint_steps=config.checkpoint_steps,
        )
        model.interpolate_with(previous, config.interpolation)
        after = model.accuracy(judged, config.eval_batch_size)["accuracy"]
        directory.log(
            {"stage": "refine", "iteration": iteration, "step": None, "event": "quality",
             "pairs": len(judged), "accuracy_before": before, "accuracy_after": after}
        )  # fmt: skip
    model.save(directory.reward(iteration + 1))


def _distinct(items: Sequence[Item]) -> list[Item]:
    return list({item.prompt: item for item in reversed(items)}.values())[::-1]


def _answers(session: Session, model: Any, items: Sequence[Item], seed: int) -> list[dict[str, Any]]:
    """One sampled answer for each item: rows of item, prompt, completion (text) and ids."""
    rows = []
    for number, batch in enumerate(batches(items, session.config.eval_batch_size)):
        ids = trimmed(session.sample(model, batch, seed + number))
        texts = session.texts(ids)
        rows += [
            {"item": item, "prompt": item.prompt, "completion": text, "ids": row}
            for item, text, row in zip(batch, texts, ids, strict=True)
        ]
    return rows


def _rewards(session: Session, reward: Any, rows: Sequence[dict[str, Any]]) -> list[float]:
    prompts, completions = [row["item"].ids for row in rows], [row["ids"] for row in rows]
    return reward.score(prompts, completions, session.config.eval_batch_size)
