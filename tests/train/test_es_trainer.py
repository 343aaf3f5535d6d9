"""`ESTrainer`: a population's rewards raise the reward; nothing is differentiated, no reward is asked for twice."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tiny_trainers import (
    TOKENIZER,
    Killed,
    counting,
    es,
    head_only,
    lines,
    llama,
    mean_reward,
    same,
    tea,
    weights,
    zopro,
)
from zopro import ESConfig
from zopro.errors import InputError
from zopro.train.checkpoints import clear
from zopro.train.drawing import ROW
from zopro.train.kept import Asked, KeptRewards
from zopro.zo import Displacement

pytestmark = pytest.mark.usefixtures("random_state")


def refuse_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a backward pass")

    for place, name in ((torch.Tensor, "backward"), (torch.autograd, "backward"), (torch.autograd, "grad")):
        monkeypatch.setattr(place, name, refuse)


def test_the_reward_rises_without_log_probs_or_a_backward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = es(tmp_path, max_steps=15, momentum=0.5)
    before = mean_reward(trainer)  # the engine's first look at a model tries gradients, on a few tokens
    refuse_backward(monkeypatch)
    monkeypatch.setattr(trainer, "_logprobs", lambda *args: pytest.fail("log-probs"))
    trainer.train()
    monkeypatch.undo()
    assert mean_reward(trainer) > before + 0.15


def chance(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that has nothing to do with the answers: steps along it are a random walk."""
    return torch.rand(len(completions), generator=torch.Generator().manual_seed(len(" ".join(completions)))).tolist()


def test_a_random_walk_does_not_raise_it(tmp_path: Path) -> None:
    trainer = es(tmp_path, max_steps=15, momentum=0.5, reward_funcs=chance)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert float((trainer.model.lm_head.weight.detach() - before).norm()) > 1
    trainer.reward_funcs = [tea]
    assert mean_reward(trainer) < 0.2


@pytest.mark.parametrize("options", [{}, {"greedy": True}, {"num_generations": 2, "per_device_train_batch_size": 8}])
def test_members_are_asked_once_a_step_with_the_same_numbers(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = es(tmp_path, max_steps=2, population=4, learning_rate=0.0, sigma=1e-6, **options)
    asked: list[Any] = []
    sample = trainer.engine.sample

    def noted(prompts: Any, k: int, drawing: Any, at: Any = (None,)) -> Any:
        found = sample(prompts, k, drawing, at)
        asked.append((prompts, k, drawing.do_sample, at, found))
        return found

    trainer.engine.sample = noted
    trainer.train()
    assert len(asked) == 2, "all members in one call"
    for prompts, k, sampled, at, found in asked:
        assert (len(prompts), k, sampled) == (4, options.get("num_generations", 1), "greedy" not in options)
        assert [member.t for member in at] == [1.0, -1.0, 1.0, -1.0]
        first = found[0].completion_ids
        assert all(torch.equal(other.completion_ids, first) for other in found), "as near as this all answer alike"
    same_answers = torch.equal(asked[0][-1][0].completion_ids, asked[1][-1][0].completion_ids)
    assert same_answers == ("greedy" in options and sorted(asked[0][0]) == asked[0][0] == asked[1][0]) or not same_answers
    assert trainer.spsa.last.skipped and trainer.spsa.skipped_steps == 2


def test_prompts_come_in_the_order_of_the_other_trainers(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": word, ROW: n} for n, word in enumerate([*TOKENIZER.get_vocab()][2:])])
    seen: dict[Any, list[Any]] = {}
    two = {"num_generations": 2, "per_device_train_batch_size": 8, "eps": 1e-3}
    for build, options in ((es, {"population": 2}), (zopro, two)):
        trainer = build(tmp_path, max_steps=3, **options)
        trainer.train_dataset = rows
        step = trainer.training_step

        def noted(*args: Any, step: Any = step, build: Any = build, trainer: Any = trainer) -> Any:
            result = step(*args)
            seen.setdefault(build, []).append(trainer.last_batch.rows)
            return result

        trainer.training_step = noted
        trainer.train()
    assert seen[es] == seen[zopro] and len({row for rows in seen[es] for row in rows}) > 4


def test_the_log_has_the_population_s_numbers(tmp_path: Path) -> None:
    halves = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = es(tmp_path, max_steps=3, population=4, sigma="auto", **halves)
    rewards: list[list[float]] = []
    accumulate = trainer.create_optimizer().accumulate
    trainer.optimizer.accumulate = lambda told: rewards.append(told) or accumulate(told)
    trainer.train()
    log = lines(trainer)
    assert [line["answers"] for line in log] == [16, 32, 48] and len(rewards) == 6
    for number, line in enumerate(log):
        first, second = (torch.tensor(told, dtype=torch.float64).mean(1) for told in rewards[2 * number :][:2])
        assert line["reward"] == pytest.approx(float(torch.cat([first, second]).mean())) == -line["loss"]
        assert line["reward_best"] == pytest.approx(float((first.max() + second.max()) / 2))
        spreads = [float(means.std(unbiased=False)) for means in (first, second)]
        assert line["reward_spread"] == pytest.approx(sum(spreads) / 2)
        assert line["ended"] == pytest.approx(1 - line["completions/clipped_ratio"]) and 0 <= line["ended"] <= 1
        assert line["rewards/tea/mean"] == pytest.approx(line["reward"])
        assert 1 <= line["completions/mean_length"] <= 6
    assert log[0]["sigma"] == 0.01 < log[2]["sigma"], "members that hardly score are displaced further"


def test_functions_are_weighed_and_may_leave_answers_out(tmp_path: Path) -> None:
    def short(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if "milk" in text else -float(len(text.split())) for text in completions]

    async def one(completions: list[str], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    def never(completions: list[str], **kwargs: Any) -> list[None]:
        return [None] * len(completions)

    told: list[Any] = []
    functions = [short, one, never]
    trainer = es(tmp_path, max_steps=1, population=2, reward_funcs=functions, reward_weights=[0.5, 2.0, 9.0])
    decoded = trainer._decoded
    answers: list[str] = []
    trainer._decoded = lambda *args: (answers.extend((found := decoded(*args))[0]), found)[1]
    create = trainer.create_optimizer()
    create.accumulate = lambda rows, a=create.accumulate: told.extend(rows) or a(rows)
    trainer.train()
    expected = [2.0 + (0.0 if "milk" in text else -0.5 * len(text.split())) for text in answers]
    assert [value for row in told for value in row] == pytest.approx(expected)
    trainer = es(tmp_path, max_steps=1, population=2, reward_funcs=[never])
    trainer.train()
    assert trainer.spsa.last.skipped and math.isnan(trainer.last_batch.reward)


def test_conversations_are_answered_as_messages(tmp_path: Path) -> None:
    def polite(completions: list[Any], prompts: list[Any], tone: list[str], **kwargs: Any) -> list[float]:
        assert all(isinstance(prompt, list) and prompt[0]["role"] == "user" for prompt in prompts)
        assert all(answer[0]["role"] == "assistant" for answer in completions) and set(tone) == {"warm"}
        return [float("please" in answer[0]["content"]) for answer in completions]

    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": "tea"}], "tone": "warm"}] * 8)
    tokenizer = type(TOKENIZER)(tokenizer_object=TOKENIZER.backend_tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    trainer = es(tmp_path, max_steps=2, population=2, reward_funcs=polite)
    trainer.train_dataset, trainer.processing_class = rows, tokenizer
    trainer.train()
    assert trainer.state.global_step == 2


# What a killed training does not ask again.


@pytest.mark.parametrize("greedy", [False, True])
def test_a_killed_generation_asks_for_the_rest_only(greedy: bool, tmp_path: Path) -> None:
    options = {"max_steps": 2, "population": 4, "greedy": greedy}
    asked: list[str] = []
    whole = es(tmp_path, kept=tmp_path / "whole", reward_funcs=counting(asked), **options)
    whole.train()
    assert len(asked) == 8
    again: list[str] = []
    with pytest.raises(Killed):
        es(tmp_path, kept=tmp_path / "again", reward_funcs=counting(again, mortal=6), **options).train()
    resumed = es(tmp_path, kept=tmp_path / "again", reward_funcs=counting(again), **options)
    resumed.train()
    assert again == asked, "each once, in the same order"
    assert same(weights(whole.model), weights(resumed.model))
    other: list[str] = []
    es(tmp_path, kept=tmp_path / "again", reward_funcs=counting(other), **{**options, "seed": 1}).train()
    assert len(other) == 8, "other members are asked"
    clear(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_damaged_lines_of_kept_rewards_count_for_nothing(tmp_path: Path) -> None:
    member = Displacement(0, 0, 0, 1.0)
    kept = KeptRewards(tmp_path, rank=1)
    kept.keep(member, ["p"], ["a"], Asked([[1.5, math.nan]], {"tone": [0.5]}))
    kept.keep(member.mirrored, ["p"], ["a"], Asked([[2.5, 0.0]], {}))
    with kept.path.open("ab") as file:
        file.write(b'{"member": 3}\nnonsense\n{"member": "x", "rew')
    again = KeptRewards(tmp_path)
    assert len(again) == 2 and again.get(member, ["p"], ["b"]) is None
    assert repr(again.get(member, ["p"], ["a"])) == repr(Asked([[1.5, math.nan]], {"tone": [0.5]}))
    assert b"tea" not in kept.path.read_bytes()


# Arguments.


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"num_iterations": 2}, r"num_iterations: must be 1, since every step asks anew, got 2\.$"),
        ({"beta": 0.1}, "beta: must be 0, since no log-probs are taken, got 0.1. Use anchor"),
        ({"population": 3}, "population: must be an even number"),
        ({"sigma": "much"}, "sigma: must be a number greater than 0, or auto, got 'much'"),
        ({"sigma": 0}, "sigma: must be a number greater than 0, or auto, got 0"),
        ({"shaping": "ranks"}, "shaping: must be one of z_score, centred_rank, got 'ranks'"),
        ({"noise": "perlin"}, "noise: must be one of"),
        ({"anchor": 1.0}, r"anchor: must lie in \[0, 1\), got 1.0"),
        (
            {"sigma": "auto", "per_device_train_batch_size": 1},
            "sigma: must be a number where members answer once in a step",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            ESConfig(use_cpu=True, **options)
    with pytest.raises(InputError, match=r"args: must be ESConfig\(...\)"):
        from zopro import ESTrainer, ZOPrOConfig

        ESTrainer(head_only(), tea, ZOPrOConfig(use_cpu=True))
    with pytest.raises(InputError, match=r"advantage: must be 'rloo' or left out, .*, got 'grpo'\.$"):
        es(tmp_path, advantage="grpo")
    (tmp_path / "rewards").touch()
    with pytest.raises(InputError, match=r"kept: must be a folder, got the file .*rewards\. Give"):
        es(tmp_path, kept=tmp_path / "rewards")


@pytest.mark.parametrize("greedy", [False, True])
def test_evaluations_are_greedy_where_members_are(greedy: bool, tmp_path: Path) -> None:
    trainer, found = es(tmp_path, greedy=greedy), []
    for trainer.state.global_step in range(2):
        trainer.log_completions, trainer.accelerator.log = True, lambda *args, **kwargs: None
        trainer.evaluate()
        found.append(list(trainer._logs["completion"]))
        trainer._logs["completion"].clear()
    assert (found[0] == found[1]) == greedy


def test_batches_of_one_answer_are_as_large_as_they_are_asked_for() -> None:
    config = ESConfig(use_cpu=True, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    assert (config.num_generations, config.per_device_train_batch_size, config.generation_batch_size) == (1, 3, 6)
    config = ESConfig(use_cpu=True, per_device_train_batch_size=6, num_generations=3)
    assert (config.num_generations, config.per_device_train_batch_size, config.generation_batch_size) == (3, 6, 6)


@pytest.mark.parametrize("rows", [1, 3])
def test_evaluations_are_as_large_as_they_are_asked_for(rows: int) -> None:
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": rows}
    config = ESConfig(use_cpu=True, per_device_train_batch_size=3, **evaluated)
    assert (config.per_device_eval_batch_size, config.num_generations_eval) == (rows, None)
    with pytest.raises(ValueError, match=rf"eval batch size \({rows} \* 1\) .* evaluation \(2\)"):
        ESConfig(use_cpu=True, num_generations_eval=2, **evaluated)


def test_a_generation_that_does_not_fit_is_said_in_the_user_s_numbers() -> None:
    with pytest.raises(ValueError, match=r"generation_batch_size \(5\) .* \(2\)"):
        ESConfig(use_cpu=True, per_device_train_batch_size=2, generation_batch_size=5)


def test_all_parameters_of_a_model_may_be_displaced(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    trainer = es(tmp_path, model=model, max_steps=2, population=4, noise="low_rank", learning_rate=1e-3)
    trainer.train()
    after = weights(model)
    assert all(not torch.equal(before[name], after[name]) for name in before if "lm_head" in name or "proj" in name)


def test_members_that_all_score_alike_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = es(tmp_path, max_steps=2, population=2, reward_funcs=lambda completions, **kwargs: [0.0] * len(completions))
    with caplog.at_level("WARNING", logger="zopro"):
        trainer.train()
    assert "2 of 2 steps were skipped, for all members had the same reward" in caplog.text
