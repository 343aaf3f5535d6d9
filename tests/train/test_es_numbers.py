"""What `ESTrainer` hands to reward functions, and what it logs, evaluates and warns of."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tiny_trainers import PROMPTS, es, head_only, lines, quiet, settings, word_tokenizer, zopro
from zopro import ES, ESConfig, ESTrainer
from zopro.train.population import Scored, numbers

pytestmark = pytest.mark.usefixtures("random_state")

FEW: dict[str, Any] = {"population": 2, "max_completion_length": 3}


def test_members_are_scored_by_what_the_rows_say(tmp_path: Path) -> None:
    """A reward function may go on writing in the conversation, and in its columns, as in TRL."""
    seen: list[Any] = []

    def judged(prompts: list[Any], completions: list[Any], notes: list[list[str]], **columns: Any) -> list[float]:
        for prompt, answer, note in zip(prompts, completions, notes, strict=True):
            prompt += answer
            note.append("read")
            answer.append({"role": "user", "content": "thanks"})
        seen.append([(len(prompt), len(note)) for prompt, note in zip(prompts, notes, strict=True)])
        return [float(len(prompt)) for prompt in prompts]

    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": p}], "notes": ["new"]} for p in PROMPTS])
    args = ESConfig(**settings(tmp_path, max_steps=1, population=4, max_completion_length=3))
    quiet(ESTrainer(head_only(), judged, args, rows, processing_class=tokenizer)).train()
    assert seen == [[(2, 2)] * 4] * 4


def evaluated(folder: Path, **options: Any) -> Any:
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    return es(folder, max_steps=3, population=8, **saving, **options)


def test_the_best_checkpoint_is_that_of_the_best_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = evaluated(tmp_path, load_best_model_at_end=True, learning_rate=0.5, per_device_eval_batch_size=16)
    monkeypatch.setattr(trainer.engine, "logprobs", lambda *args: pytest.fail("log-probs"))
    monkeypatch.setattr(trainer, "_score", lambda *args: pytest.fail("log-probs"))
    trainer.train()
    found = [line for line in trainer.state.log_history if "eval_loss" in line]
    assert [line["eval_loss"] for line in found] == [-line["eval_reward"] for line in found], "30 rows: one is smaller"
    losses = [line["eval_loss"] for line in found]
    assert len(set(losses)) == 3 and trainer.state.best_metric == min(losses)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{1 + losses.index(min(losses))}")
    predicted = trainer.predict(trainer.eval_dataset).metrics
    assert predicted["test_loss"] == trainer.evaluate()["eval_loss"] == -trainer.evaluate()["eval_reward"]


def test_an_evaluation_without_rewards_has_no_loss(tmp_path: Path) -> None:
    trainer = es(tmp_path, reward_funcs=lambda completions, **columns: [None] * len(completions), **FEW)
    assert math.isnan(trainer.evaluate()["eval_loss"])


def test_a_step_s_time_is_that_of_its_micro_batches(tmp_path: Path) -> None:
    def slow(completions: list[str], **columns: Any) -> list[float]:
        time.sleep(0.02)
        return [0.0] * len(completions)

    cut = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1, "logging_steps": 2}
    trainer = es(tmp_path, max_steps=2, reward_funcs=slow, **FEW, **cut)
    trainer.train()
    (line,) = lines(trainer)
    assert line["step_time"] >= 4 * 2 * 0.02, "two members in each of four micro-batches"
    assert 2 * line["step_time"] <= trainer.state.log_history[-1]["train_runtime"]


def test_prompts_that_tell_no_member_apart_are_counted_by_prompt(tmp_path: Path) -> None:
    def alternating(completions: list[str], **columns: Any) -> list[float]:
        return [float(place % 2) for place in range(len(completions))]

    options = {"num_generations": 2, "reward_funcs": alternating, "max_steps": 1, **FEW}
    trainer = es(tmp_path, **options)
    trainer.train()
    assert lines(trainer)[0]["frac_reward_zero_std"] == 0, "a prompt's two answers get 0 and 1"
    one = Scored([1.0, 1.0, 0.0, 1.0], [1.0] * 4, [1.0] * 4, [[0.0] * 4], 4.0)
    assert [numbers([one, one], ["told"], each)["frac_reward_zero_std"] for each in (1, 2, 4)] == [1, 0.5, 0]
    assert numbers([one, one], ["told"], 8)["frac_reward_zero_std"] == 0, "a half of its answers is in this micro-batch"


@pytest.mark.parametrize("build", [es, zopro])
def test_functions_of_one_name_have_columns_of_their_own(build: Any, tmp_path: Path) -> None:
    functions = [lambda completions, value=value, **columns: [value] * len(completions) for value in (0.0, 1.0, 4.0)]
    options = FEW if build is es else {"eps": 1e-3, "max_completion_length": 3}
    trainer = build(tmp_path, reward_funcs=functions, max_steps=1, log_completions=True, **options)
    trainer.train()
    names = ["<lambda>", "<lambda>_2", "<lambda>_3"]
    assert [lines(trainer)[0][f"rewards/{name}/mean"] for name in names] == [0.0, 1.0, 4.0]
    table = trainer._logs["rewards"]
    assert {name: set(table[name]) for name in names} == {names[0]: {0.0}, names[1]: {1.0}, names[2]: {4.0}}
    assert lines(trainer)[0]["reward"] == 5.0


@pytest.mark.parametrize("alike", [0.0, None])
def test_why_steps_were_skipped_is_said(alike: float | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = es(tmp_path, max_steps=2, reward_funcs=lambda completions, **columns: [alike] * len(completions), **FEW)
    with caplog.at_level("INFO", logger="zopro"):
        trainer.train()
    reasons = {0.0: "all members had the same reward: raise sigma", None: "no answer had a reward from every member: let"}
    for value, reason in reasons.items():
        assert (f"2 of 2 steps were skipped, for {reason}" in caplog.text) == (value == alike)
    assert ("skipped: nothing has a reward from every member" in caplog.text) == (alike is None)
    assert trainer.spsa.unscored_steps == (2 if alike is None else 0)


def test_skipped_steps_are_told_apart_after_a_resumption_too() -> None:
    def make() -> ES:
        return ES([("w", torch.zeros(2))], population=2)

    first, second = make(), make()
    for rewards in ([math.nan, 1.0], [1.0, 1.0]):
        first.tell(rewards)
    assert (first.skipped_steps, first.unscored_steps) == (2, 1)
    state = first.state_dict()
    second.load_state_dict(state)
    assert (second.skipped_steps, second.unscored_steps) == (2, 1)
    del state["zeroth_order"]["unscored_steps"]  # as 0.1.0 has it
    second.load_state_dict(state)
    assert (second.skipped_steps, second.unscored_steps) == (2, 0)


def test_answers_of_a_generation_that_another_training_made_are_not_trained_on(tmp_path: Path) -> None:
    asked: list[int] = []

    def noted(completions: list[str], **columns: Any) -> list[float]:
        asked.append(len(completions))
        return [float(len(text)) for text in completions]

    options: dict[str, Any] = {"num_generations": 2, "max_completion_length": 3, "eps": 1e-3, "reward_funcs": noted}
    sizes = {"per_device_train_batch_size": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 1}
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = zopro(tmp_path, max_steps=4, **options, **sizes, **saving)
    trainer.train()
    trainer._current_train_step_time = 9.0  # of a step that failed
    assert asked == [8]
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert asked == [8, 8], "as a trainer of its own asks"
    assert lines(trainer)[-1]["step_time"] < 9
