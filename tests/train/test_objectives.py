"""Objectives against plain loops and against the numbers of TRL's own trainers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from tiny_trainers import PROMPTS, head_only, online, tea
from zopro.system.random_state import preserve_random_state
from zopro.train import objectives

K = 4


def values(rows: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def test_an_answer_without_a_reward_is_neither_best_nor_worst() -> None:
    nan = math.nan
    rewards = torch.tensor([-1.0, nan, -3.0, -2.0, nan, nan, nan, 5.0])
    best, worst = objectives.best_and_worst(rewards, 4)
    assert (best[0], worst[0]) == (0, 2)
    logprobs, reference = torch.zeros(8), torch.zeros(8)
    loss = objectives.online_dpo_loss(logprobs, reference, rewards, num_generations=4, beta=0.1)
    assert float(loss) == pytest.approx(math.log(2) / 2), "the second prompt has one reward, which says nothing"


def test_leave_one_out_against_a_loop() -> None:
    rewards = values()
    expected = []
    for start in range(0, len(rewards), K):
        group = rewards[start : start + K].tolist()
        expected += [r - (sum(group) - r) / (K - 1) for r in group]
    assert torch.allclose(objectives.rloo_advantages(rewards, K), torch.tensor(expected), atol=1e-6)


def test_a_completion_without_a_reward_moves_nothing() -> None:
    rewards = torch.tensor([1.0, math.nan, 4.0, math.nan, 2.0, math.nan])
    assert objectives.rloo_advantages(rewards, 3).tolist() == [-3.0, 0.0, 3.0, 0.0, 0.0, 0.0]
    assert objectives.group_normalised_advantages(rewards, 3, scale=False).tolist() == [-1.5, 0.0, 1.5, 0.0, 0.0, 0.0]
    assert objectives.group_normalised_advantages(rewards, 3).isfinite().all()


def test_group_normalisation_against_a_loop() -> None:
    rewards = values(seed=1)
    expected = []
    for start in range(0, len(rewards), K):
        group = rewards[start : start + K].tolist()
        mean = sum(group) / K
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (K - 1))
        expected += [(r - mean) / (deviation + 1e-4) for r in group]
    assert torch.allclose(objectives.group_normalised_advantages(rewards, K), torch.tensor(expected), atol=1e-5)


def test_clipped_surrogate_against_a_loop_and_on_policy() -> None:
    new, old, advantages = values(seed=2), values(seed=3), values(seed=4)
    terms = []
    for n, o, a in zip(new.tolist(), old.tolist(), advantages.tolist(), strict=True):
        ratio = math.exp(n - o)
        terms.append(min(ratio * a, min(max(ratio, 0.9), 1.3) * a))
    loss = objectives.clipped_surrogate(new, old, advantages, 0.1, 0.3)
    assert float(loss) == pytest.approx(-sum(terms) / len(terms), rel=1e-5)
    leaf = new.clone().requires_grad_()
    loss = objectives.clipped_surrogate(leaf, new, advantages)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(-float(advantages.mean()), rel=1e-5)
    assert torch.allclose(leaf.grad, -advantages / len(new))


def test_log_ratio_surrogate_has_the_clipped_one_s_gradient_on_policy() -> None:
    old, advantages = values(8), values(8, seed=1)
    gradients = []
    for surrogate in (objectives.clipped_surrogate, objectives.log_ratio_surrogate):
        logprobs = old.clone().requires_grad_()
        surrogate(logprobs, old, advantages).backward()
        gradients.append(logprobs.grad)
    assert torch.allclose(*gradients, atol=1e-7)
    moved = old + 0.5
    expected = -sum(float(a) * 0.5 for a in advantages) / 8
    assert float(objectives.log_ratio_surrogate(moved, old, advantages)) == pytest.approx(expected, abs=1e-6)


def test_online_dpo_against_a_loop() -> None:
    logprobs, reference, rewards = (values(seed=seed) for seed in (5, 6, 7))
    rewards[:K] = 1.0  # a prompt whose completions are all equal
    losses = []
    for start in range(0, len(rewards), K):
        rows = range(start, start + K)
        best, worst = max(rows, key=lambda i: float(rewards[i])), min(rows, key=lambda i: float(rewards[i]))
        margin = float((logprobs - reference)[best] - (logprobs - reference)[worst])
        losses.append(0.0 if start == 0 else math.log1p(math.exp(-0.3 * margin)))
    assert float(objectives.online_dpo_loss(logprobs, reference, rewards, K, 0.3)) == pytest.approx(
        sum(losses) / len(losses), rel=1e-5
    )


def test_pairs_are_chosen_as_trl_s_online_dpo_chooses_them() -> None:
    """TRL: of two completions the first is chosen where its reward is at least the second's."""
    rewards = torch.tensor([1.0, 2.0, 3.0, 3.0, 5.0, 4.0])
    best, worst = objectives.best_and_worst(rewards, 2)
    first_wins = rewards[0::2] >= rewards[1::2]
    assert torch.equal(best, torch.arange(3) * 2 + (~first_wins).long())
    assert torch.equal(worst, torch.arange(3) * 2 + first_wins.long())


def test_kl_estimates() -> None:
    """Against the sum over a small vocabulary: k1 and k3 are unbiased; k2 and k3 are never negative."""
    policy, reference = values(8, 8).double().log_softmax(0), values(8, 9).double().log_softmax(0)
    kl = float((policy.exp() * (policy - reference)).sum())
    for kind in ("k1", "k3"):
        assert float((policy.exp() * objectives.kl_estimates(policy, reference, kind)).sum()) == pytest.approx(kl)
    for kind in ("k2", "k3"):
        assert bool((objectives.kl_estimates(policy, reference, kind) >= 0).all())
    with pytest.raises(ValueError, match=r"kind: must be k1, k2 or k3, got 'k4'"):
        objectives.kl_estimates(policy, reference, "k4")


@pytest.mark.parametrize("generations", [1, 5])
def test_groups_must_fit(generations: int) -> None:
    for function in (objectives.rloo_advantages, objectives.group_normalised_advantages, objectives.best_and_worst):
        with pytest.raises(
            ValueError, match=rf"num_generations: must be at least 2 and divide 12 rows, got {generations}"
        ):
            function(values(), generations)


def rollouts(trainer_cls: type, config_cls: type, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    with preserve_random_state():
        trainer = online(trainer_cls, config_cls, folder, {"model": head_only(), **options})
        trainer.model.train()
        inputs = trainer._generate_and_score_completions([{"prompt": p} for p in PROMPTS for _ in range(8)])
    return trainer, inputs


def scores(inputs: dict[str, Any], trainer: Any) -> torch.Tensor:
    return torch.tensor(tea(trainer._tokenizer.batch_decode(inputs["completion_ids"], skip_special_tokens=True)))


def test_rloo_s_numbers_are_trl_s(tmp_path: Path) -> None:
    trainer, inputs = rollouts(RLOOTrainer, RLOOConfig, tmp_path)
    assert torch.allclose(objectives.rloo_advantages(scores(inputs, trainer), 8), inputs["advantages"], atol=1e-6)
    inputs["old_logps"] = inputs["old_logps"] + 0.2 * values(32)
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, inputs))
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
        kept = inputs["completion_ids"].shape[1]
        tokens = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, kept)[0]
        logprobs = (tokens * inputs["completion_mask"]).sum(1)
    ours = objectives.clipped_surrogate(
        logprobs, inputs["old_logps"], inputs["advantages"], trainer.epsilon_low, trainer.epsilon_high
    )
    assert float(ours) == pytest.approx(loss, rel=1e-5)


def test_grpo_s_numbers_are_trl_s(tmp_path: Path) -> None:
    trainer, inputs = rollouts(GRPOTrainer, GRPOConfig, tmp_path)
    ours = objectives.group_normalised_advantages(scores(inputs, trainer), 8)
    assert torch.allclose(ours, inputs["advantages"], atol=1e-5)
