"""`zeroth_order`: every library trainer learns without a backward pass, and its base class's loop keeps working."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tiny_trainers import (
    SUPERVISED,
    Build,
    dpo,
    lines,
    llama,
    mean_reward,
    plain,
    rloo,
    same,
    settings,
    sft,
    tea,
    weights,
    with_adapter,
    zopro,
)
from zopro import SPSA, ZOPrOConfig, ZOPrOTrainer, zeroth_order
from zopro.zo import Rademacher

# Without what the first step searches for and checks, where a test is not about them.
QUICK: dict[str, Any] = {"eps": 1e-3, "check_slope": False}


def small_dpo(folder: Path, zo: dict[str, Any], **options: Any) -> Any:
    """Adapters on two layers: all seven take twice as long."""
    return dpo(folder, zo, with_adapter(targets=["v_proj", "down_proj"]), **options)


SMALL: dict[str, Build] = {**SUPERVISED, "DPO": small_dpo}

pytestmark = pytest.mark.usefixtures("random_state")


class Watch(TrainerCallback):
    """Counts events, and parameters that have a gradient when the optimiser is about to step."""

    def __init__(self) -> None:
        self.gradients = 0
        self.steps: list[int] = []
        self.evaluations = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients += sum(parameter.grad is not None for parameter in model.parameters())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluations += 1


# Learning. The slope of each step: test_trainer_table.py.


@pytest.mark.parametrize("kind", SUPERVISED)
def test_supervised_trainers_lower_their_loss_without_gradients(kind: str, tmp_path: Path) -> None:
    zo, steps, rate, less = {"queries": 2}, 8, 2e-2, 0.1
    if kind == "DPO":
        zo, steps, rate, less = {**QUICK, **zo}, 12, 8e-2, 0.04
    trainer = SMALL[kind](tmp_path, zo, max_steps=steps, learning_rate=rate)
    watch = Watch()
    trainer.add_callback(watch)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before - less
    assert watch.gradients == 0 and watch.steps == list(range(1, steps + 1))
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert lines(trainer)[0]["loss"] == pytest.approx(before, rel=1e-3), "the loss logged is the one at theta"


def test_an_online_trainer_raises_its_reward_without_gradients(tmp_path: Path) -> None:
    trainer = rloo(tmp_path, {"queries": 2}, max_steps=5, learning_rate=0.4)
    watch = Watch()
    trainer.add_callback(watch)
    before = mean_reward(trainer)
    trainer.train()
    after = mean_reward(trainer)
    assert before < 0.15 and after > before + 0.15, (before, after)
    assert watch.gradients == 0
    assert max(line["signal_to_noise"] for line in lines(trainer)) > 30


# The base class's loop.


def test_log_has_what_was_measured_and_no_gradient_norm(tmp_path: Path) -> None:
    trainer = sft(tmp_path, {}, max_steps=2)
    trainer.train()
    expected = {"loss", "learning_rate", "projected_gradient", "signal_to_noise", "eps", "skipped_steps"}
    assert all(expected <= line.keys() and "grad_norm" not in line for line in lines(trainer))
    assert all(math.isfinite(line[key]) for line in lines(trainer) for key in expected)
    assert lines(trainer)[-1]["projected_gradient"] == trainer.spsa.last.projected_gradient
    assert lines(trainer)[-1]["eps"] == trainer.spsa.last.eps[0] > 0
    trainer.evaluate(trainer.train_dataset)
    assert "projected_gradient" not in trainer.state.log_history[-1]


@pytest.mark.parametrize("kind", SUPERVISED)
def test_gradient_accumulation_equals_the_larger_batch(kind: str, tmp_path: Path) -> None:
    finals, logged = [], []
    for size, accumulation in ((4, 1), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
        trainer = SMALL[kind](tmp_path, QUICK, **options)
        trainer.train()
        finals.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
        logged.append([line["loss"] for line in lines(trainer)])
        assert trainer.spsa.step_count == 2
    assert torch.allclose(*finals, atol=3e-4)
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)


RESUMABLE: dict[str, Build] = {
    "Trainer": lambda path, **options: plain(path, {}, **options),
    "SFT with dropout": lambda path, **options: sft(path, QUICK, llama(attention_dropout=0.3), **options),
    "DPO": lambda path, **options: small_dpo(path, QUICK, **options),
    "ZOPrO": zopro,
    "ZOPrO along an update": lambda path, **options: zopro(
        path, previous_update={"lm_head.weight": torch.ones(12, 16)}, reward_update={}, eps=1e-3, **options
    ),
}


@pytest.mark.parametrize("kind", RESUMABLE)
def test_checkpoint_resumes_to_the_same_weights(kind: str, tmp_path: Path) -> None:
    """In the middle of the run, several epochs in, in a process whose random state is another one."""
    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "seed": 7}
    options["lr_scheduler_type"] = "linear"
    whole = RESUMABLE[kind](tmp_path / "a", **options)
    start = weights(whole.model)
    whole.train()
    resumed = RESUMABLE[kind](tmp_path / "b", **options)
    torch.rand(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert same(weights(whole.model), weights(resumed.model))
    assert not same(start, weights(whole.model))
    assert repr(resumed.spsa.last) == repr(whole.spsa.last) and resumed.spsa.step_count == 3
    assert [line["loss"] for line in lines(whole)] == [line["loss"] for line in lines(resumed)]


def test_learning_rate_schedule_is_what_the_steps_use(tmp_path: Path) -> None:
    used: list[float] = []

    class Record(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            used.extend(trainer.spsa.last.learning_rates)

    trainer = plain(tmp_path, QUICK, max_steps=5, lr_scheduler_type="linear", learning_rate=1e-2)
    trainer.add_callback(Record)
    trainer.train()
    assert used == pytest.approx([1e-2 * (1 - step / 5) for step in range(5)])


def test_evaluation_and_callbacks_during_training_change_nothing(tmp_path: Path) -> None:
    alone = sft(tmp_path, QUICK, max_steps=2)
    alone.train()
    watched = sft(tmp_path, QUICK, max_steps=2, eval_strategy="steps", eval_steps=1)
    watch = Watch()
    watched.add_callback(watch)
    watched.train()
    assert watch.steps == [1, 2] and watch.evaluations == 2
    assert [line["eval_loss"] > 0 for line in watched.state.log_history if "eval_loss" in line] == [True, True]
    assert same(weights(alone.model), weights(watched.model))


@pytest.mark.parametrize(("kind", "zo"), [("SFT", {}), ("Reward", QUICK), ("DPO", QUICK)])
def test_tokens_are_counted_once_and_not_once_a_side(kind: str, zo: dict[str, Any], tmp_path: Path) -> None:
    ours, base = (SMALL[kind](tmp_path, {"queries": 2, **zo}, base=base, max_steps=2) for base in (False, True))
    ours.train()
    base.train()
    tokens = [[line["num_tokens"] for line in lines(trainer)] for trainer in (ours, base)]
    assert tokens[0] == tokens[1] and tokens[0][-1] > 0


def test_only_adapters_move(tmp_path: Path) -> None:
    model = with_adapter()
    before = weights(model)
    trainer = sft(tmp_path, QUICK, model, max_steps=1)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name in before if "lora" in name}
    assert not any("default" in name or "base_model" in name for name in trainer.spsa.param_groups[0]["param_names"])


@pytest.mark.parametrize("build", [sft, dpo], ids=["SFT", "DPO"])
def test_virtual_perturbation_reaches_every_weight(build: Build, tmp_path: Path) -> None:
    """TRL patches and fuses parts of the forward pass: what reads a weight there must see it displaced as well."""
    finals = []
    for perturbation in ("in_place", "virtual"):
        trainer = build(tmp_path, {**QUICK, "perturbation": perturbation, "queries": 2}, max_steps=1)
        trainer.train()
        finals.append((repr(trainer.spsa.last), weights(trainer.model)))
    assert finals[0][0] == finals[1][0] and same(finals[0][1], finals[1][1])


def test_bf16_autocast_around_the_loss(tmp_path: Path) -> None:
    trainer = sft(tmp_path, {"queries": 2, "check_slope": False}, bf16=True, max_steps=4, learning_rate=4e-2)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < before - 0.1
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}
    assert max(line["signal_to_noise"] for line in lines(trainer)) > 3


def test_options_reach_the_optimiser(tmp_path: Path) -> None:
    chosen = zeroth_order(Trainer, directions=Rademacher(), sides=1, eps=1e-3, second_moment_beta=None, seed=5)
    arguments = TrainingArguments(**settings(tmp_path, weight_decay=0.1, learning_rate=0.5))
    assert issubclass(chosen, Trainer) and chosen.__name__ == "ZerothOrderTrainer"
    opt = chosen(llama(), arguments).create_optimizer()
    assert isinstance(opt, SPSA) and isinstance(opt.directions, Rademacher)
    assert (opt.sides, opt.seed, opt.second_moment.beta) == (1, 5, None)
    assert {(g["lr"], g["eps"], g["weight_decay"]) for g in opt.param_groups} == {(0.5, 1e-3, 0.1)}
    default = zeroth_order(Trainer)(llama(), TrainingArguments(**settings(tmp_path, seed=9))).create_optimizer()
    assert (default.param_groups[0]["eps"], default.second_moment.beta, default.seed) == ("auto", 0.9, 9)


@pytest.mark.parametrize("explicit", [True, False])
def test_gradient_checkpointing_is_switched_off(explicit: bool, tmp_path: Path) -> None:
    """TRL's configs switch it on unless they are told otherwise."""
    trainer = sft(tmp_path, QUICK, max_steps=1, **({"gradient_checkpointing": True} if explicit else {}))
    trainer.train()
    assert not trainer.args.gradient_checkpointing and not trainer.model.is_gradient_checkpointing


def test_non_finite_loss_is_skipped_counted_and_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.compute_loss
    trainer = plain(tmp_path, QUICK, max_steps=3)
    before = weights(trainer.model)
    monkeypatch.setattr(
        Trainer, "compute_loss", lambda *a, **k: original(*a, **k) * (math.nan if trainer.state.global_step == 1 else 1)
    )
    trainer.train()
    assert [line["skipped_steps"] for line in lines(trainer)] == [0, 1, 1]
    assert all(torch.isfinite(tensor).all() for tensor in weights(trainer.model).values())
    assert not same(before, weights(trainer.model))


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"trainer_cls: must be a subclass"):
        zeroth_order(dict)
    with pytest.raises(ValueError, match="nothing to train"):
        sft(tmp_path, {}, llama().requires_grad_(False)).train()
    arguments = TrainingArguments(**settings(tmp_path))
    arguments.fp16 = True
    with pytest.raises(ValueError, match=r"fp16: must be off"):
        zeroth_order(Trainer)(llama(), arguments)
    online = ZOPrOConfig(**settings(tmp_path))
    online.fp16 = True
    with pytest.raises(ValueError, match=r"fp16: must be off"):  # behind a trainer that takes **kwargs
        ZOPrOTrainer(llama(), reward_funcs=tea, args=online)
    model = llama()
    adam = torch.optim.AdamW(model.parameters())
    trainer = zeroth_order(Trainer)(model, TrainingArguments(**settings(tmp_path)), optimizers=(adam, None))
    with pytest.raises(ValueError, match=r"optimizers: must hold a zopro.SPSA or nothing, got AdamW"):
        trainer.create_optimizer()
    with pytest.raises(
        ValueError, match=r"optimizer_cls_and_kwargs: must be None, since zopro.SPSA takes the steps, got SGD"
    ):
        zeroth_order(Trainer)(
            llama(), TrainingArguments(**settings(tmp_path)), optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 1.0})
        )
