"""Stages of one run: supervised fine-tuning, the first reward model, sampled and judged pairs, the refined reward model.

Each is a function of the run, its models and its data (and, inside the loop, the iteration) that leaves its output whole
in the run directory. `zopro.loop.table` has all of them in their order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from zopro.errors import diverging
from zopro.loop.answers import ask_judge, sample_all
from zopro.loop.data import Data, Item
from zopro.loop.learned import answered, ending_within, held_out_quality, pairs, scored
from zopro.loop.models import Models
from zopro.loop.policy_stage import iteration_items
from zopro.loop.run import Run
from zopro.rewards import Pair, RewardModel
from zopro.rewards.sequences import Sequences
from zopro.store import shown
from zopro.store.rundir import read_rows, whole_folder
from zopro.system.random_state import preserve_random_state
from zopro.text.chat import shared_length
from zopro.train.arguments import quiet_arguments, scaled_gradients
from zopro.train.callbacks import be_quiet
from zopro.train.checkpoints import checkpointed, fit


def train_sft(run: Run, models: Models, data: Data) -> None:
    """Supervised fine-tuning on prompts and chosen answers; only answers that end within the limit are used.

    Without steps the policy is the base model, whatever the rows have.
    """
    config, store, policies = run.config, run.store, models.policies
    if not store.initial().exists():
        with policies.open(None) as model, whole_folder(store.initial()) as folder:
            policies.save(model, folder)
    rows = _sft_rows(run, models, data) if config.sft_steps else []
    start = None if policies.full else store.initial()
    rate = diverging("sft_learning_rate", config.sft_learning_rate)
    with rate, policies.open(start, trainable=True) as model, whole_folder(store.sft()) as folder:
        if rows:
            _fit_sft(run, models, model, rows)
        policies.save(model, folder)


def _sft_rows(run: Run, models: Models, data: Data) -> list[Item]:
    rows = [*answered(data.train, ending_within(models.frame, run.config))]
    run.say(f"SFT on {len(rows)} of {len(data.train)} rows (answers that fit max_completion_length)")
    return rows


def _fit_sft(run: Run, models: Models, model: Any, rows: Sequence[Item]) -> None:
    config = run.config
    arguments = quiet_arguments(
        SFTConfig,
        output_dir=run.store.trainer("sft"),
        steps=config.sft_steps,
        batch_size=config.sft_batch_size,
        learning_rate=config.sft_learning_rate,
        seed=run.seed("sft"),
        device=models.base.device,
        report_to=config.report_to,
        checkpoint_steps=config.checkpoint_steps,
        max_length=models.max_length,
        completion_only_loss=True,
        **scaled_gradients(models.base),
    )
    sequences, _ = Sequences(models.tokenizer, models.max_length, models.frame).from_text(
        [item.prompt for item in rows], [item.example.chosen or "" for item in rows]
    )
    begins = [shared_length(item.ids, ids) for item, ids in zip(rows, sequences, strict=True)]
    masks = [[0] * begin + [1] * (len(ids) - begin) for begin, ids in zip(begins, sequences, strict=True)]
    with preserve_random_state():
        trainer = checkpointed(SFTTrainer)(
            model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": sequences, "completion_mask": masks}),
            processing_class=models.tokenizer,
            callbacks=[run.callback("sft", None)],
        )
        be_quiet(trainer)
        fit(trainer)


def train_reward(run: Run, models: Models, data: Data) -> None:
    """The first reward model: pairwise, or by regression on direct-assessment scores where the task has those."""
    with diverging("reward_learning_rate", run.config.reward_learning_rate):
        _train_reward(run, models, data)


def _train_reward(run: Run, models: Models, data: Data) -> None:
    config, store, model, fits = run.config, run.store, models.reward, ending_within(models.frame, run.config)
    options: dict[str, Any] = {
        "steps": config.reward_steps,
        "batch_size": config.reward_batch_size,
        "learning_rate": config.reward_learning_rate,
        "seed": run.seed("reward"),
        "callbacks": [run.callback("reward", None)],
        "report_to": config.report_to,
        "output_dir": store.trainer("reward"),
        "checkpoint_steps": config.checkpoint_steps,
    }
    if data.regressed:
        model.train_scores([*scored(data.train, fits)], **options)
    else:
        model.train_pairs([*pairs(data.train, fits)], **options)
    quality = held_out_quality(model, data, config.eval_batch_size)
    store.log({"stage": "reward", "iteration": None, "step": None, "event": "quality", **quality})
    model.save(store.reward(0))
    run.say(f"reward model on held-out rows: {shown.quality(quality)}")


def sample_pairs(run: Run, models: Models, data: Data, iteration: int) -> None:
    """Sample, keep the answers whose reward is nearest zero, draw a second one for each, and let the judge choose.

    samples.jsonl has every first answer and its reward; preferences.jsonl the judged pairs. All lists are made from
    the same rows in the same order, so prompts, answers, references and rewards stay aligned.
    """
    config, store = run.config, run.store
    items = _distinct(iteration_items(run, data, iteration, len(data.train)))[: config.pair_prompts]
    reward = models.reward_from(store.reward(iteration))
    with models.policies.open(store.policy(iteration)) as model:
        rows = _answers(run, models, model, items, run.seed("samples", iteration))
        for row, value in zip(rows, _rewards(run, reward, rows), strict=True):
            row["reward"] = value
        count = math.ceil(config.uncertain_share * len(rows))
        uncertain = sorted(rows, key=lambda row: abs(row["reward"]))[:count]
        seconds = _answers(run, models, model, [row["item"] for row in uncertain], run.seed("second", iteration))
    for second, value in zip(seconds, _rewards(run, reward, seconds), strict=True):
        second["reward"] = value
    result = ask_judge(
        run,
        models,
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
    store.log({"stage": "pairs", "iteration": iteration, "step": None, **numbers, **counts})
    store.write_rows(store.samples(iteration), samples)
    store.write_rows(store.preferences(iteration), preferences)
    run.say(
        f"iteration {iteration}: {len(preferences)} pairs from {len(uncertain)} judged "
        f"({result.ties} ties, {result.invalid} invalid verdicts)"
        + ("; nothing to refine the reward model on" if not preferences else "")
    )


def refine_reward(run: Run, models: Models, data: Data, iteration: int) -> None:
    """Train the reward model on the judged pairs, interpolate it with its predecessor, and save what will be used."""
    with diverging("refine_learning_rate", run.config.refine_learning_rate):
        _refine_reward(run, models, iteration)


def _refine_reward(run: Run, models: Models, iteration: int) -> None:
    config, store = run.config, run.store
    rows = read_rows(store.preferences(iteration))
    model = models.reward_from(store.reward(iteration))
    judged = [Pair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    if judged:
        previous = model.state()
        before = model.accuracy(judged, config.eval_batch_size)["accuracy"]
        model.train_pairs(
            judged,
            steps=config.refine_steps,
            batch_size=min(config.reward_batch_size, len(judged)),
            learning_rate=config.refine_learning_rate,
            seed=run.seed("refine", iteration),
            callbacks=[run.callback("refine", iteration), *run.snapshots("reward", iteration, model.save)],
            report_to=config.report_to,
            output_dir=store.trainer("refine", iteration),
            checkpoint_steps=config.checkpoint_steps,
        )
        model.interpolate_with(previous, config.interpolation)
        after = model.accuracy(judged, config.eval_batch_size)["accuracy"]
        store.log(
            {"stage": "refine", "iteration": iteration, "step": None, "event": "quality",
             "pairs": len(judged), "accuracy_before": before, "accuracy_after": after}
        )  # fmt: skip
    model.save(store.reward(iteration + 1))


def _distinct(items: Sequence[Item]) -> list[Item]:
    return list({item.prompt: item for item in reversed(items)}.values())[::-1]


def _answers(run: Run, models: Models, model: Any, items: Sequence[Item], seed: int) -> list[dict[str, Any]]:
    """One sampled answer for each item: rows of item, prompt, completion (text) and ids."""
    ids = [row for rollout in sample_all(run, models, model, items, seed) for row in rollout.answers()]
    return [
        {"item": item, "prompt": item.prompt, "completion": text, "ids": row}
        for item, text, row in zip(items, models.texts(ids), ids, strict=True)
    ]


def _rewards(run: Run, reward: RewardModel, rows: Sequence[dict[str, Any]]) -> list[float]:
    prompts, completions = [row["item"].ids for row in rows], [row["ids"] for row in rows]
    return reward.score(prompts, completions, run.config.eval_batch_size)
