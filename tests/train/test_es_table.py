"""`ESTrainer`'s table of completions, and what it counts when it is resumed by transformers alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from tiny_trainers import PROMPTS, es, lines, same, weights, zopro
from zopro.train.epochs import micro_batches

pytestmark = pytest.mark.usefixtures("random_state")


def test_the_table_has_the_first_member_s_answers(tmp_path: Path) -> None:
    told: list[Any] = []

    def words(prompts: list[str], completions: list[str], log_extra: Any, **columns: Any) -> list[float]:
        rewards = [float(len(text.split())) for text in completions]
        log_extra("asked", [prompt.upper() for prompt in prompts])
        told.append((list(prompts), list(completions), rewards))
        return rewards

    def milky(completions: list[str], log_extra: Any, **columns: Any) -> list[float | None]:
        if len(told) > 2:  # a column that comes later
            log_extra("late", ["yes"] * len(completions))
        return [1.0 if "milk" in text else None for text in completions]

    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "log_completions": True}
    trainer = es(tmp_path, max_steps=1, population=2, reward_funcs=[words, milky], **options)
    trainer.train()
    table, (first, mirrored, second, other) = trainer._logs, told
    assert list(table["prompt"]) == first[0] + second[0] and sorted(table["prompt"]) == sorted(PROMPTS)
    assert list(table["completion"]) == first[1] + second[1]
    assert list(table["rewards"]["words"]) == first[2] + second[2]
    assert [math.isnan(value) for value in table["rewards"]["milky"]] == ["milk" not in t for t in table["completion"]]
    totals = [
        [own + ("milk" in text) for own, text in zip(rewards, texts, strict=True)]
        for _, texts, rewards in (first, second, mirrored, other)
    ]
    own, opposite = totals[0] + totals[1], totals[2] + totals[3]
    assert list(table["advantages"]) == pytest.approx([(a - b) / 2 for a, b in zip(own, opposite, strict=True)])
    assert list(table["extra"]["asked"]) == [prompt.upper() for prompt in table["prompt"]]
    assert list(table["extra"]["late"]) == [None, None, "yes", "yes"]


def test_no_table_without_the_option(tmp_path: Path) -> None:
    trainer = es(tmp_path, max_steps=1, population=2)
    trainer.train()
    assert not trainer._logs["prompt"]


@pytest.mark.parametrize("done", [1, 3])
def test_a_resumed_training_goes_on_with_its_prompts_and_numbers(done: int, tmp_path: Path) -> None:
    def run(folder: str, **training: Any) -> tuple[Any, list[Any]]:
        asked: list[Any] = []

        def noted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
            asked.append(tuple(prompts))
            return [float(len(text)) for text in completions]

        trainer = es(tmp_path / folder, max_steps=4, population=2, reward_funcs=noted, **options)
        trainer.train(**training)
        return trainer, asked

    options = {"save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2, "per_device_train_batch_size": 2}
    whole, asked = run("whole")
    checkpoint = tmp_path / "whole" / "out" / f"checkpoint-{done}"
    resumed, rest = run("resumed", resume_from_checkpoint=str(checkpoint))
    assert rest == asked[2 * done :] and same(weights(whole.model), weights(resumed.model))
    assert [line["answers"] for line in lines(resumed)] == [line["answers"] for line in lines(whole)] == [4, 8, 12, 16]


def test_other_trainers_count_on_too(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "steps_per_generation": 2, "per_device_train_batch_size": 8}
    small = {"num_generations": 4, "max_steps": 2, "learning_rate": 0.0, **options}
    zopro(tmp_path, **small).train()
    resumed = zopro(tmp_path, **small)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed._step == 2


def test_an_epoch_s_last_step_may_have_fewer_micro_batches() -> None:
    taken = [3, 1] * 5  # of four by three
    assert [micro_batches(steps, 4, 3) for steps in range(10)] == [sum(taken[:steps]) for steps in range(10)]
