"""Guided trainers: the reward rises, Adam gets the pseudo-gradient, the guard refuses what does not go downhill."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import RLOOConfig

from families import family_model
from tiny_trainers import PROMPTS, adapted, head_only, lines, llama, mean_reward, online, same, weights, word_tokenizer
from zopro.engine.feedback import Feedback
from zopro.errors import InputError
from zopro.train.guided import FeedbackScores, GuidedConfig, GuidedSPSAConfig, GuidedSPSATrainer, GuidedTrainer
from zopro.train.online_dpo import OnlineDPOTrainer
from zopro.train.rloo import EngineRLOOTrainer
from zopro.weights.adapters import tensor_name
from zopro.zo.guided import ResidualFeedback

pytestmark = pytest.mark.usefixtures("random_state")


def adam(folder: Path, **options: Any) -> Any:
    return online(GuidedTrainer, GuidedConfig, folder, {"model": adapted(), "learning_rate": 5e-2, **options})


def spsa(folder: Path, **options: Any) -> Any:
    own = {"model": adapted(), "learning_rate": 3e-2, "eps": 1e-2}
    return online(GuidedSPSATrainer, GuidedSPSAConfig, folder, {**own, **options})


def everywhere() -> Any:
    """As `adapted`, on all kinds of layers."""
    model = llama(hidden_size=32, intermediate_size=64, num_hidden_layers=2, initializer_range=0.3)
    return get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_with_all_of_the_prompts_swept_it_takes_the_steps_of_back_propagation(tmp_path: Path, random_state: None) -> None:
    own: dict[str, Any] = {"learning_rate": 0.1, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    models = [everywhere()]
    models += [copy.deepcopy(models[0]) for _ in range(2)]
    first_order = online(EngineRLOOTrainer, RLOOConfig, tmp_path, {"model": models[0], **own})
    guided = adam(tmp_path, model=models[1], tail=0, guard_every=0, **own)
    partly = adam(tmp_path, model=models[2], local="none", guard_every=0, **own)
    before = weights(guided.model)
    for trainer in (first_order, guided, partly):
        trainer.train()
    after, expected, other = (weights(trainer.model) for trainer in (guided, first_order, partly))
    moved = max(float((expected[name] - before[name]).abs().max()) for name in before)
    assert moved > 1e-3
    assert all(torch.allclose(after[name], expected[name], atol=1e-2 * moved) for name in before), (
        "but for bfloat16 prompts"
    )
    assert not all(torch.allclose(other[name], expected[name], atol=0.1 * moved) for name in before)


@pytest.mark.parametrize(
    ("build", "local", "steps", "rate"),
    [(adam, "none", 8, 0.1), (adam, "block", 4, 5e-2), (spsa, "chain", 5, 3e-2)],
)
def test_the_reward_rises(build: Any, local: str, steps: int, rate: float, tmp_path: Path) -> None:
    trainer = build(tmp_path, local=local, max_steps=steps, learning_rate=rate, seed=int(build is spsa))
    before = mean_reward(trainer)
    trainer.train()
    assert mean_reward(trainer) > before + 0.3


def test_steps_stay_orthogonal_to_what_is_avoided(tmp_path: Path) -> None:
    model = adapted()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    avoid = {name: torch.randn(model.get_parameter(name).shape) for name in names}
    trainer = spsa(tmp_path, model=model, avoid=avoid, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    after, moved = weights(trainer.model), 0
    for name, away in avoid.items():
        change = (after[name] - before[name]).double()
        moved += bool(change.any())
        assert abs(float((change * away).sum())) <= 1e-5 * float(change.norm() * away.norm()), name
    assert moved > 5


def test_what_is_avoided_must_be_of_the_model(tmp_path: Path) -> None:
    name = next(name for name, parameter in adapted().named_parameters() if parameter.requires_grad)
    for avoid, said in (
        ({"wte.weight": torch.ones(2)}, "avoid: must name parameters of the policy"),
        ({name: torch.ones(3, 3)}, "avoid: .* must have its parameter's shape"),
        ({name: torch.full_like(adapted().get_parameter(name), torch.inf)}, "avoid: must be finite"),
    ):
        with pytest.raises(ValueError, match=said):
            adam(tmp_path, model=adapted(), avoid=avoid)


def test_a_mixture_moves_every_adapter(tmp_path: Path) -> None:
    trainer = spsa(tmp_path, guide=0.5, max_steps=4)
    before, start = mean_reward(trainer), weights(trainer.model)
    trainer.train()
    assert mean_reward(trainer) > before + 0.1
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    assert moved == {name for name in start if ".default." in name}


def test_only_guided_adapters_move(tmp_path: Path) -> None:
    trainer = adam(tmp_path, local="none", max_steps=1)
    start = weights(trainer.model)
    trainer.train()
    moved = {name for name, tensor in weights(trainer.model).items() if not torch.equal(tensor, start[name])}
    assert {tensor_name(name) for name in moved} == set(trainer.feedback.parameters)
    assert all("lora_B" in name and ("o_proj" in name or "down_proj" in name) for name in moved)


def batch(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(8)])


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """TRL's loop is untouched: accumulation, clipping and the optimiser see a gradient like any other."""
    whole = adam(tmp_path, max_steps=1)
    parts = adam(tmp_path, max_steps=1, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    for trainer in (whole, parts):
        trainer.train()
    a, b = ([line["grad_norm"] for line in lines(trainer)] for trainer in (whole, parts))
    assert a == pytest.approx(b, rel=1e-3) and a[0] > 0


def test_the_guard_measures_the_slope_and_theta_stays(tmp_path: Path) -> None:
    trainer = adam(tmp_path, guard_every=1, local="chain", max_steps=1)
    start = weights(trainer.model)
    inputs = batch(trainer)
    loss = trainer.compute_loss(trainer.model, inputs)
    assert same(weights(trainer.model), start)
    assert trainer._metrics["train"]["guide/refused"] == [0.0]
    assert trainer._metrics["train"]["guide/slope_ratio"][0] == pytest.approx(1, abs=0.4)
    loss.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in trainer.feedback.parameters.values())
    trainer.train()
    assert all("guide/slope" in line for line in lines(trainer))


def test_the_guard_measures_the_slope_also_where_it_leaves_the_clip_range(tmp_path: Path) -> None:
    trainer = adam(tmp_path, guard_every=1, tail=0, max_steps=1)
    inputs = batch(trainer)
    trainer.epsilon_low = trainer.epsilon_high = 1e-6
    trainer.compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["guide/slope_ratio"][0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("local", ["chain", "block"])
def test_the_guard_changes_no_step_and_its_pass_runs_without_what_the_first_one_kept(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []
    chain, block, logprobs = Feedback._gradients, Feedback._swept, GuidedTrainer._answer_logprobs

    def gradients(self: Any, error: torch.Tensor, kept: Any) -> Any:
        held.extend(weakref.ref(tensor) for tensor in kept.values())
        return chain(self, error, kept)

    def swept(self: Any, error: torch.Tensor, calls: Any, real: torch.Tensor) -> Any:
        held.extend(weakref.ref(kept.inputs) for kept in (calls._answers, calls._prompts))
        return block(self, error, calls, real)

    def guard(self: Any, *args: Any) -> Any:
        alive.append(sum(reference() is not None for reference in held))
        return logprobs(self, *args)

    monkeypatch.setattr(Feedback, "_gradients", gradients)
    monkeypatch.setattr(Feedback, "_swept", swept)
    monkeypatch.setattr(GuidedTrainer, "_answer_logprobs", guard)
    ends = []
    for every in (1, 0):
        trainer = adam(tmp_path / str(every), guard_every=every, max_steps=1, local=local)
        trainer.train()
        ends.append(weights(trainer.model))
    assert held and alive == [0, 0]
    assert same(*ends)


@pytest.mark.parametrize(("local", "name"), [("chain", "_gradients"), ("block", "_swept")])
def test_a_direction_that_goes_uphill_is_not_followed(
    local: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = adam(tmp_path, guard_every=1, local=local)
    honest = getattr(trainer.feedback, name)

    def reversed_signs(*arguments: Any, **named: Any) -> Any:
        return {key: -gradient for key, gradient in honest(*arguments, **named).items()}

    monkeypatch.setattr(trainer.feedback, name, reversed_signs)
    trainer.compute_loss(trainer.model, batch(trainer)).backward()
    assert trainer._metrics["train"]["guide/refused"] == [1.0]
    assert all(float(p.grad.abs().max()) == 0 for p in trainer.feedback.parameters.values())


def test_equal_rewards_are_neither_followed_nor_refused(tmp_path: Path) -> None:
    trainer = adam(tmp_path, guard_every=1)
    inputs = batch(trainer)
    inputs["advantages"] = torch.zeros_like(inputs["advantages"])
    trainer.compute_loss(trainer.model, inputs).backward()
    assert not trainer._metrics["train"]["guide/refused"]


class GuidedOnlineDPOTrainer(FeedbackScores, OnlineDPOTrainer):
    """Another objective on the same guess: nothing but its name."""


def test_other_objectives_take_the_same_parts(tmp_path: Path) -> None:
    options = {"model": adapted(), "beta": 0.1, "max_steps": 5, "learning_rate": 5e-2}
    trainer = online(GuidedOnlineDPOTrainer, GuidedConfig, tmp_path, options)
    before = mean_reward(trainer)
    trainer.train()
    assert mean_reward(trainer) > before + 0.3


def test_evaluation_needs_no_guess(tmp_path: Path) -> None:
    trainer = adam(tmp_path)
    assert 0 <= mean_reward(trainer) < 0.3
    assert trainer._feedback is None


def test_spsa_asks_for_one_guess_a_step(tmp_path: Path) -> None:
    trainer = spsa(tmp_path, max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2)
    trainer.train()
    directions = trainer.spsa.directions
    assert isinstance(directions, ResidualFeedback) and directions.step == 1 and trainer.spsa.step_count == 2


def test_what_cannot_be_guided_is_refused(tmp_path: Path) -> None:
    trainer = online(GuidedTrainer, GuidedConfig, tmp_path, {"model": head_only(), "max_steps": 1})
    with pytest.raises(InputError, match=r"lora_target_modules: must name layers that write to the residual stream"):
        trainer.train()
    with pytest.raises(ValueError, match=r"guide: must lie in \(0, 1\], got 0"):
        GuidedSPSAConfig(use_cpu=True, guide=0)


def test_a_mixture_of_experts_is_guided_without_its_balancing_loss(tmp_path: Path) -> None:
    """TRL adds that loss by default, through a forward pass of its own that the guide knows nothing of."""
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")

    model = get_peft_model(family_model("qwen3_moe", vocab_size=len(word_tokenizer()), pad_token_id=None), config)
    trainer = adam(tmp_path, model=model, max_steps=1)
    before = weights(trainer.model)
    trainer.train()
    assert not same(before, weights(trainer.model))
    model.delete_adapter("ref")
    with pytest.raises(ValueError, match=r"router_aux_loss_coef: must be 0 with guided trainers.* got 0\.1"):
        adam(tmp_path, model=model, router_aux_loss_coef=0.1)
