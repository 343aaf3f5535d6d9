"""`ZOPrOTrainer`: targeted directions raise the reward, rollouts carry true log-probs, the reference is the one given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_trainers import PROMPTS, TOKENIZER, lines, llama, mean_reward, tea, weights, with_adapter, zopro
from zopro import ZOPrOConfig
from zopro.choices import DIRECTIONS
from zopro.config.step import PRESETS
from zopro.errors import InputError
from zopro.system.random_state import preserve_random_state
from zopro.weights.adapters import tensor_name
from zopro.zo import Gaussian, Targeted

pytestmark = pytest.mark.usefixtures("random_state")


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """mu: what an iteration of SPSA changed, which raised the reward."""
    with preserve_random_state():
        trainer = zopro(tmp_path_factory.mktemp("previous"), queries=4, eps=1e-3, max_steps=12)
        trainer.train()
        return {"lm_head.weight": trainer.model.lm_head.weight.detach() - llama().lm_head.weight.detach()}


def test_going_on_along_the_previous_update_beats_plain_spsa(previous: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """The paper's premise: where mu raised the reward, mu raises it further, more than as many random directions."""
    rewards = {}
    for update in (previous, {}):
        trainer = zopro(tmp_path, max_steps=8, eps=1e-3, previous_update=update, reward_update={})
        trainer.train()
        rewards[type(trainer.spsa.directions)] = mean_reward(trainer)
    assert rewards[Targeted] > 0.25 and rewards[Targeted] > rewards[Gaussian] + 0.05, rewards


def test_an_update_that_did_harm_is_walked_back(previous: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """SPSA measures the slope along it: a guess of the wrong sign costs nothing."""
    harm = {name: -tensor for name, tensor in previous.items()}
    trainer = zopro(tmp_path, max_steps=7, eps=1e-3, previous_update=harm, reward_update={})
    before = mean_reward(trainer)
    trainer.train()
    assert mean_reward(trainer) > before + 0.1


def test_the_paper_s_preset_learns_too(previous: dict[str, torch.Tensor], tmp_path: Path) -> None:
    options = {"preset": "paper", "max_steps": 12, "learning_rate": 1.0, "reward_update": {}}
    trainer = zopro(tmp_path, previous_update=previous, **options)
    before = mean_reward(trainer)
    trainer.train()
    assert mean_reward(trainer) > before + 0.1
    assert all(line["eps"] == 1e-5 for line in lines(trainer))
    assert trainer.spsa.second_moment.beta is None and not trainer.spsa.directions.normalize


def test_presets_say_what_they_are() -> None:
    default, paper = ZOPrOConfig(use_cpu=True), ZOPrOConfig(use_cpu=True, preset="paper")
    assert (default.eps, default.normalize, default.second_moment_beta) == ("auto", True, 0.9)
    assert (paper.eps, paper.normalize, paper.second_moment_beta, paper.decay) == (1e-5, False, 0.0, "linear")
    assert (default.learning_rate, paper.learning_rate) == (PRESETS["default"], PRESETS["paper"]) == (1e-4, 1.0)
    given = ZOPrOConfig(use_cpu=True, preset="paper", eps=1e-3, learning_rate=0.5)
    assert (given.eps, given.learning_rate) == (1e-3, 0.5)
    with pytest.raises(ValueError, match=r"preset: must be one of default, paper, got 'papre'"):
        ZOPrOConfig(use_cpu=True, preset="papre")


@pytest.mark.parametrize(("options", "steps"), [({"max_steps": 3}, 3), ({"max_steps": -1, "num_train_epochs": 2}, 2)])
def test_directions_know_the_iteration_s_steps(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    """One epoch is one step here: four prompts, eight completions each, 32 rows a step."""
    wrapped = {"base_model.model.lm_head.weight": torch.ones(12, 16)}
    trainer = zopro(tmp_path, previous_update=wrapped, reward_update=wrapped, decay="exponential", eps=1e-3, **options)
    trainer.train()
    directions = trainer.spsa.directions
    assert isinstance(directions, Targeted) and directions.decay == "exponential"
    assert directions.total_steps == steps == trainer.spsa.step_count
    assert list(directions.previous_update) == list(directions.reward_update) == ["lm_head.weight"]


@pytest.mark.parametrize("noise", [choice.name for choice in DIRECTIONS.values() if not choice.of_update])
def test_noise_is_drawn_as_asked(noise: str, tmp_path: Path) -> None:
    update = {"lm_head.weight": torch.ones(12, 16)}
    targeted = zopro(tmp_path / "targeted", previous_update=update, noise=noise).directions()
    assert isinstance(targeted, Targeted) and type(targeted.noise) is DIRECTIONS[noise].load()
    assert type(zopro(tmp_path / "alone", noise=noise).directions()) is DIRECTIONS[noise].load()
    with pytest.raises(ValueError, match=r"noise: must be one of gaussian, .*, python:MODULE:NAME, got 'pink'"):
        ZOPrOConfig(use_cpu=True, noise="pink")


def test_gradient_accumulation_takes_one_step_for_all_micro_batches(tmp_path: Path) -> None:
    trainer = zopro(tmp_path, max_steps=2, eps=1e-3, per_device_train_batch_size=8, gradient_accumulation_steps=4)
    trainer.train()
    assert trainer.spsa.step_count == 2 == len(lines(trainer))


def test_updates_of_another_model_are_refused(tmp_path: Path) -> None:
    trainer = zopro(tmp_path, previous_update={"lm_head.weight": torch.ones(2, 16)}, max_steps=1)
    with pytest.raises(ValueError, match=r"previous_update: 'lm_head.weight' must have its parameter's shape"):
        trainer.train()
    trainer = zopro(tmp_path, previous_update={"wte.weight": torch.ones(2, 16)}, max_steps=1)
    with pytest.raises(ValueError, match=r"previous_update: must name parameters of the policy"):
        trainer.train()


def test_the_base_and_the_reference_policy_stay(tmp_path: Path) -> None:
    trainer = zopro(tmp_path, model=with_adapter(), max_steps=2, eps=1e-3, beta=0.1)
    before = weights(trainer.model)
    trainer.train()
    for name, tensor in weights(trainer.model).items():
        assert torch.equal(tensor, before[name]) != (".default." in name), name


def generated(trainer: Any) -> dict[str, Any]:
    trainer.model.train()
    return trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(8)])


def log_probs(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Sequence log-probs from transformers' own forward pass."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=mask, position_ids=positions).logits / trainer.temperature
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return (picked[:, -inputs["completion_ids"].shape[1] :] * inputs["completion_mask"]).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_rollouts_carry_the_log_probs_that_a_forward_pass_gives(temperature: float, tmp_path: Path) -> None:
    trainer = zopro(tmp_path, model=with_adapter(), temperature=temperature)
    inputs = generated(trainer)
    assert torch.allclose(inputs["old_logps"], log_probs(trainer, inputs), atol=1e-4)
    assert inputs["completion_mask"].sum() > inputs["completion_mask"].shape[0]


def test_on_policy_the_ratio_is_one_and_the_loss_is_minus_the_mean_advantage(tmp_path: Path) -> None:
    trainer = zopro(tmp_path, model=with_adapter(), beta=0.05)
    inputs = generated(trainer)
    inputs["advantages"] = torch.randn_like(inputs["advantages"])
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, inputs))
    assert loss == pytest.approx(-float(inputs["advantages"].mean()), abs=1e-5)
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0]


def test_reference_policy_is_the_one_given(tmp_path: Path) -> None:
    model = with_adapter()
    given = {tensor_name(n): torch.full_like(p, 0.25) for n, p in model.named_parameters() if p.requires_grad}
    trainer = zopro(tmp_path, model=model, reference=given, beta=0.5)
    held = [parameter for name, parameter in trainer.model.named_parameters() if ".ref." in name]
    assert len(held) == len(given) and all(bool((parameter == 0.25).all()) for parameter in held)
    inputs = generated(trainer)
    rewards = torch.tensor(tea(TOKENIZER.batch_decode(inputs["completion_ids"], skip_special_tokens=True)))
    policy = log_probs(trainer, inputs)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name:
                parameter.fill_(0.25)
    kl = policy - log_probs(trainer, inputs)
    total = (rewards - 0.5 * kl).view(-1, 8)
    advantages = (total - (total.sum(1, keepdim=True) - total) / 7).flatten()
    assert torch.allclose(inputs["advantages"], advantages, atol=1e-3)
    assert float(kl.abs().mean()) > 0.01
    with pytest.raises(
        InputError, match=r"reference: must be left out where the model has no second adapter .* got 1 tens"
    ):
        zopro(tmp_path, reference={"lm_head.weight": torch.ones(12, 16)})
    with pytest.raises(ValueError, match=r"reference: must have the policy's adapter tensors in their shapes, got None"):
        zopro(tmp_path, model=with_adapter(), reference={"nothing": torch.zeros(1)})


def test_rollouts_depend_on_seed_step_and_prompts_only(tmp_path: Path) -> None:
    a, b = (zopro(tmp_path, seed=3) for _ in "ab")
    torch.rand(3)
    first = generated(a)["completion_ids"]
    state = torch.get_rng_state()
    assert torch.equal(first, generated(b)["completion_ids"])
    assert torch.equal(torch.get_rng_state(), state), "sampling must not use the global random state"
    b.state.global_step = 1
    other = generated(b)["completion_ids"]
    assert other.shape != first.shape or not torch.equal(first, other)


def slope(trainer: Any, inputs: dict[str, Any], eps: float) -> float:
    """Central difference of the trainer's loss along one direction of its adapters."""
    named = [(tensor_name(name), p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    z = Gaussian().sample(named, seed=3, step=0)
    losses = []
    for sign in (1, -2):
        for name, parameter in named:
            parameter.data.add_(z[name], alpha=sign * eps)
        trainer._measuring = True
        with torch.no_grad():
            losses.append(float(trainer._compute_loss(trainer.model, dict(inputs))))
    for name, parameter in named:
        parameter.data.add_(z[name], alpha=eps)
    return (losses[0] - losses[1]) / (2 * eps)


def test_log_ratios_have_the_slope_of_the_clipped_ratio_and_keep_it_further_out(tmp_path: Path) -> None:
    trainers = {
        surrogate: zopro(tmp_path, model=with_adapter(), surrogate=surrogate) for surrogate in ("clipped", "log_ratio")
    }
    inputs = generated(trainers["clipped"])
    inputs["advantages"] = torch.randn(len(inputs["advantages"]), generator=torch.Generator().manual_seed(0))
    near = {name: slope(trainer, inputs, 1e-4) for name, trainer in trainers.items()}
    far = {name: slope(trainer, inputs, 0.02) for name, trainer in trainers.items()}
    assert near["log_ratio"] == pytest.approx(near["clipped"], rel=0.02)
    assert far["log_ratio"] == pytest.approx(near["log_ratio"], rel=0.2)
    assert far["clipped"] != pytest.approx(near["clipped"], rel=0.4)


@pytest.mark.parametrize("surrogate", ["clipped", "log_ratio"])
def test_one_sided_steps_evaluate_once(surrogate: str, tmp_path: Path) -> None:
    trainer = zopro(tmp_path, max_steps=3, sides=1, eps=1e-3, surrogate=surrogate)
    counts, losses = [], trainer._compute_loss

    def counted(*args: Any) -> torch.Tensor:
        counts.append(trainer.state.global_step)
        return losses(*args)

    trainer._compute_loss = counted
    trainer.train()
    assert trainer.spsa.trusts_known_loss
    assert [counts.count(step) for step in (1, 2)] == [1, 1]


@pytest.mark.parametrize(
    ("generations", "iterations", "expected"), [(1, 1, True), (2, 1, True), (2, 2, True), (3, 1, False), (1, 3, False)]
)
def test_steps_are_on_policy_where_generations_divide_them(
    generations: int, iterations: int, expected: bool, tmp_path: Path
) -> None:
    shared = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 8, "sides": 1}
    trainer = zopro(tmp_path, steps_per_generation=generations, num_iterations=iterations, **shared)
    assert trainer.on_policy == expected and (trainer.loss_at_theta({"advantages": torch.ones(2)}) == 0.0) == expected


def test_off_policy_steps_take_the_clipped_ratio(tmp_path: Path) -> None:
    trainer = zopro(tmp_path, max_steps=2, num_iterations=2, eps=1e-3, surrogate="log_ratio")
    assert not trainer.on_policy
    trainer.train()
    assert all("clip_ratio/region_mean" in line for line in lines(trainer))
